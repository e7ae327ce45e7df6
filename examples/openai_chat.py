"""One question and its answer, with OpenAI's client."""

import os

from openai import OpenAI

url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))

answer = client.chat.completions.create(
    model="borg-merge-v1",
    messages=[
        {"role": "system", "content": "Be brief."},  # added after the identity, which is always there
        {"role": "user", "content": "What is the capital of France?"},
    ],
    temperature=0,
)
print(answer.choices[0].message.content)
if answer.usage and answer.usage.prompt_tokens_details:
    cached = answer.usage.prompt_tokens_details.cached_tokens
    print(f"{answer.usage.prompt_tokens} prompt tokens, {cached} of them from the cache")
