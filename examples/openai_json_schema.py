"""An answer that fits a JSON schema, read into a pydantic model by OpenAI's client.

The engine enforces the shape. Whether the values are right depends on the model.
"""

import os
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """What is asked for. Without an enumeration or a bound, a small model may write on until `max_tokens`."""

    name: Literal["Paris", "Rome", "Vienna"]
    continent: Literal["Africa", "America", "Asia", "Europe"]
    is_capital: bool


url = os.environ.get("BASE_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("API_KEY", "none"))

answer = client.chat.completions.parse(
    model="borg-merge-v1",
    messages=[{"role": "user", "content": "Describe Rome as JSON."}],
    response_format=City,
    temperature=0,
    max_tokens=64,
)
print(answer.choices[0].message.parsed)
