"""A tool call and the answer to its result, with OpenAI's client.

`tool_choice` forces the call: the demo's 135M model calls no tool by itself. With the 7B model leave it out.
"""

import json
import os

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))

CITY = {"type": "string", "enum": ["Paris", "Rome"]}
CITIES = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": CITIES},
}
messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is the weather in Paris?"}]

answer = client.chat.completions.create(
    model="borg-merge-v1", messages=messages, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=64
)
message = answer.choices[0].message
messages.append(message.model_dump())  # type: ignore[arg-type]
for call in message.tool_calls or []:
    if call.type == "function":
        print(f"{call.function.name}({call.function.arguments})")
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"{city}: sunny, 31 degrees."})

answer = client.chat.completions.create(
    model="borg-merge-v1", messages=messages, tools=[WEATHER], temperature=0, max_tokens=64
)
print(answer.choices[0].message.content)
