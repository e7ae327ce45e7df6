"""Two turns with OpenAI's Responses API. The server stores nothing, so the client sends the first turn back."""

import os

from openai import OpenAI
from openai.types.responses import ResponseInputParam

url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))

turns: ResponseInputParam = []
for question in ("What is the capital of France?", "And of Italy?"):
    turns.append({"role": "user", "content": question})
    answer = client.responses.create(
        model="borg-merge-v1", instructions="Be brief.", input=turns, temperature=0, max_output_tokens=32, store=False
    )
    print(answer.output_text)
    turns += [item.model_dump() for item in answer.output]  # type: ignore[misc]
