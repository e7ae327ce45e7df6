"""A LangChain chain, prompt to model to text: one answer, and one streamed. Needs `pip install langchain-openai`."""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

model = ChatOpenAI(
    model="borg-merge-v1",
    base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=SecretStr(os.environ.get("API_KEY", "none")),
    temperature=0,
    max_completion_tokens=32,
)
prompt = ChatPromptTemplate([("system", "Be brief."), ("user", "What is the capital of {country}?")])
chain = prompt | model | StrOutputParser()

print(chain.invoke({"country": "France"}))
for text in chain.stream({"country": "Italy"}):
    print(text, end="", flush=True)
print()
