"""The original app's way over HTTP: transformers' `generate` with a TextIteratorStreamer, one request after another.

`python -m loadtests.servers.original --port 8123 --model DIR --identity FILE`. The model `original` computes the
identity for every request, `original-reused` copies its past. It speaks as much
of OpenAI's API as the clients need.
"""

import argparse
import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextIteratorStreamer

REUSED = "original-reused"


class Original:
    """A model in this process, and the past of the identity."""

    def __init__(self, directory: str, identity: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.one_at_a_time = threading.Lock()
        system = [{"role": "system", "content": identity}]
        whole = self.prompt([*system, {"role": "user", "content": "x"}])[0]
        other = self.prompt([*system, {"role": "user", "content": "y"}])[0]
        length = int((whole != other).nonzero()[0]) if len(whole) == len(other) else 0
        self.prefix = whole[: length - 1]  # a token that straddles the boundary is left to each request
        self.past = DynamicCache()
        with torch.inference_mode():
            self.model(self.prefix[None], past_key_values=self.past)

    def prompt(self, messages: list[dict[str, str]]) -> torch.Tensor:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids

    def start(self, request: dict[str, Any]) -> tuple[TextIteratorStreamer, threading.Thread, dict[str, int]]:
        """Start generating in a thread; (its text, the thread, the usage once it has ended)."""
        ids = self.prompt(request["messages"])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        words: dict[str, Any] = {"max_new_tokens": request["max_tokens"], "min_new_tokens": request["max_tokens"]}
        if request["model"] == REUSED and torch.equal(ids[0][: len(self.prefix)], self.prefix):
            words["past_key_values"] = copy.deepcopy(self.past)
        usage = {"prompt_tokens": ids.shape[1]}

        def generate() -> None:
            with torch.inference_mode():
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=streamer, **words
                )
            usage["completion_tokens"] = out.shape[1] - ids.shape[1]

        thread = threading.Thread(target=generate)
        thread.start()
        return streamer, thread, usage


class Handler(BaseHTTPRequestHandler):
    original: Original

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with self.original.one_at_a_time:
            streamer, thread, usage = self.original.start(request)
            for text in streamer:
                self.event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})
            thread.join()
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--identity", type=Path, required=True)
    arguments = parser.parse_args()
    Handler.original = Original(arguments.model, arguments.identity.read_text(encoding="utf-8").strip())
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
