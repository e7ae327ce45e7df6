"""An answer and a streamed one, with Anthropic's client."""

import os

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000"), api_key=os.environ.get("API_KEY", "none")
)

message = client.messages.create(
    model="borg-merge-v1",
    system="Be brief.",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    max_tokens=64,
    extra_body={"temperature": 0},  # this client has no argument for it
)
print("".join(block.text for block in message.content if block.type == "text"))

with client.messages.stream(
    model="borg-merge-v1", messages=[{"role": "user", "content": "Count from one to five."}], max_tokens=32
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print(f"\n{stream.get_final_message().usage.output_tokens} tokens")
