"""Greedy answers of one engine with real weights: `python -m tests.gpu.answers MODEL stock|shared OUT BATCH ...`.

Writes {batch: [[[token, log-probability], ...] of each prompt]}: the same prompts, so many at a time.
"""

import json
import sys
from pathlib import Path
from typing import Any

from borg_serve.config import load
from borg_serve.engine.arguments import SCHEDULER, WORKERS
from borg_serve.engine.attention_choice import sharing
from borg_serve.engine.environment import prepare_environment

CONFIGS = Path(__file__).parents[2] / "configs"
IDENTITY = CONFIGS / "identity" / "borg-merge-v1.md"
PROMPTS = 200
TOKENS = 48
THINGS = ("a river", "the moon", "bread", "a violin", "chess", "rain", "a lighthouse", "salt", "a bicycle", "glass")
QUESTIONS = (
    "What is {}?", "Tell me a story about {}.", "Write a poem about {}.", "Who first described {}?",
    "Why is {} useful?", "Explain {} to a child.", "List three facts about {}.",
    "What is the history of {}?", "How would you draw {}?", "What do people get wrong about {}?",
)  # fmt: skip


def prompts(tokenizer: Any) -> list[list[int]]:
    """PROMPTS distinct prompts behind the identity."""
    questions = [question.format(thing) for thing in THINGS for question in QUESTIONS]
    questions += [f"{question} Answer in one sentence." for question in questions]
    system = {"role": "system", "content": IDENTITY.read_text()}
    texts = [
        tokenizer.apply_chat_template(
            [system, {"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions[:PROMPTS]
    ]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def alike(rows: list[list[int]]) -> int:
    """How many tokens all of them begin with."""
    return next(index for index, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)


def main(model: str, attention: str, out: str, *batches: str) -> None:
    """Answer the prompts at every batch size, the identity cached before."""
    prepare_environment()
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    given = prompts(AutoTokenizer.from_pretrained(model))
    more: dict[str, Any] = {}
    if attention == "shared":  # as it is shipped: steps with prompts run in full CUDA graphs too
        graphs = load(CONFIGS / "7b-h100.yaml").engine["compilation_config"]
        more = {"scheduler_cls": SCHEDULER, "worker_cls": WORKERS["cuda"], "compilation_config": graphs}
        more |= sharing(alike(given))
    llm = LLM(model, dtype="bfloat16", max_model_len=8192, max_num_seqs=256, gpu_memory_utilization=0.5, **more)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False)

    def answer(some: list[list[int]]) -> list[list[tuple[int, float]]]:
        requests: Any = [{"prompt_token_ids": ids} for ids in some]
        outputs: Any = [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]
        return [
            [(token, found[token].logprob) for token, found in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ]

    answer(given[:2])
    answers: dict[str, Any] = {}
    for batch in map(int, batches):
        parts = [given[start : start + batch] for start in range(0, len(given), batch)]
        answers[str(batch)] = [row for part in parts for row in answer(part)]
    whole = Path(out).with_suffix(".part")
    whole.write_text(json.dumps(answers))
    whole.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
