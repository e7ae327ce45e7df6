// Asks a server in each way that the official SDKs for Node.js have, and sends each answer back as history.
// usage: node closure.mjs URL, beside node_modules. Ends with status 1 at the first refusal.
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";

const [url] = process.argv.slice(2);
const openai = new OpenAI({ apiKey: "x", baseURL: `${url}/v1`, maxRetries: 0 });
const anthropic = new Anthropic({ apiKey: "x", baseURL: url, maxRetries: 0 });
const user = { role: "user", content: "hello" };
const model = "borg-merge-v1";
const parameters = { type: "object", properties: {} };
const names = ["get_time", "f"];
const chatTools = names.map((name) => ({ type: "function", function: { name, parameters } }));
const strictTools = names.map((name) => ({ type: "function", function: { name, parameters, strict: true } }));
const flatTools = names.map((name) => ({ type: "function", name, parameters, strict: false }));
const claudeTools = names.map((name) => ({ name, input_schema: parameters }));
const forms = (answer) => [answer, JSON.parse(JSON.stringify(answer))];

const ways = {
  "chat": async () => (await openai.chat.completions.create({ model, messages: [user], tools: chatTools })).choices[0].message,
  "chat stream": async () => openai.chat.completions.stream({ model, messages: [user], tools: chatTools }).finalMessage(),
  "chat parse": async () => (await openai.chat.completions.parse({ model, messages: [user], tools: strictTools })).choices[0].message,
  "responses": async () => (await openai.responses.create({ model, input: "hello", tools: flatTools })).output,
  "responses stream": async () => (await openai.responses.stream({ model, input: "hello", tools: flatTools }).finalResponse()).output,
  "responses parse": async () => (await openai.responses.parse({ model, input: "hello", tools: flatTools })).output,
  "messages": async () => (await anthropic.messages.create({ model, max_tokens: 9, messages: [user], tools: claudeTools })).content,
  "messages stream": async () =>
    (await anthropic.messages.stream({ model, max_tokens: 9, messages: [user], tools: claudeTools }).finalMessage()).content,
  "messages beta": async () =>
    (await anthropic.beta.messages.create({ model, max_tokens: 9, messages: [user], tools: claudeTools })).content,
};
const back = (way, answer) =>
  way.startsWith("chat")
    ? openai.chat.completions.create({ model, messages: [user, answer, user] })
    : way.startsWith("responses")
      ? openai.responses.create({ model, input: [user, ...answer, user] })
      : anthropic.messages.create({ model, max_tokens: 9, messages: [user, { role: "assistant", content: answer }, user] });

for (const [way, ask] of Object.entries(ways)) {
  for (const answer of forms(await ask())) {
    await back(way, answer);
    console.log(way);
  }
}
