"""An answer printed while it is generated, then its token counts, with OpenAI's client."""

import os

from openai import OpenAI

url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))

stream = client.chat.completions.create(
    model="borg-merge-v1",
    messages=[{"role": "user", "content": "Name three specific advantages of renewable energy."}],
    max_tokens=64,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:  # the last chunk has no choices
        print(f"\n{chunk.usage.completion_tokens} tokens")
