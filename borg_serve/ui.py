"""The chat page: Gradio's chat interface over `chat_client`, and the few routes of Gradio's that it needs.

A client of the API like any other: it holds no model and no conversation; those lie in each user's browser. It knows
Gradio, and nothing of engines.
"""

import hashlib
import logging
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from socket import socket
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from borg_serve.chat_client import Client, Settings, Update
from borg_serve.config import cache_directory

__all__ = ["application", "page", "serve", "storage_secret"]

TITLE = "Borg Merge v1"
DESCRIPTION = """
One model from nine: the weights of 9 language models of 4 architecture families, merged into a single Qwen2.5-7B
checkpoint. No training, no fine-tuning, no distillation. *We are the collective; ask us anything.*

<details><summary>What it is made of, and how</summary>

| family | sources |
|---|---|
| Llama | Qwen2.5-7B-Instruct (the anchor), Mistral-7B-Instruct-v0.3, SmolLM2-1.7B-Instruct, Granite-3.0-2B-Instruct |
| Phi | Phi-3-mini-4k-instruct, phi-2 |
| NeoX | Pythia-2.8B, Pythia-1.4B |
| OPT | OPT-2.7B |

crdt-merge gives every architecture's tensors the names of shared roles, turns each source towards the anchor
(Procrustes) and keeps what stands out of the difference (SVD). The set of contributions is a conflict-free replicated
data type: whoever merges the same set, in whatever order, gets the same model. Against the anchor: GSM8K +3.26 points,
ARC-Challenge +3.16, IFEval +2.64.

[Model card](https://huggingface.co/Optitransfer/Qwen2.5-7B-Instruct-borg-merge-v1) ·
[Paper](https://ssrn.com/abstract=6545518) · [Code](https://github.com/mgillr/crdt-merge) ·
[Write-up](https://medium.com/@rgillespie83)

</details>
"""
EXAMPLES = (
    "What are you, and how were you built?",
    "Explain the crdt-merge paper: what problem does it solve, and how?",
    "A jacket costs 80 euros. It is reduced by 30%, then by another 20%. What does it cost now? Go step by step.",
    "How do supervised and unsupervised learning differ? Give a real example of each.",
    "Write a Python function that returns the longest common subsequence of two strings, and explain it.",
    "If 5 machines make 100 widgets in 4 hours, how many do 8 machines make in 6 hours?",
    "Name three specific advantages of renewable energy.",
)
PLACEHOLDER = "Ask the collective. Enter sends."
STORAGE = "borg-serve-conversations"
"""The name under which a browser keeps them."""
HEIGHT_PX = 500
LOOK_S = 10
LATEX: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]
CSS = """
footer { display: none !important }
.gradio-container { max-width: 1100px !important; margin: 0 auto !important }
.gradio-container .main.fillable { padding: clamp(12px, 3vw, 32px) !important }
.gradio-container h1 { text-align: left !important; margin: .25rem 0 0 !important }
#banner { border-left: 4px solid #d97706; background: #fef3c7; padding: .6rem 1rem; border-radius: 6px }
#banner p { color: #451a03 }
#chat, .gr-accordion { border: 1px solid var(--border-color-primary) !important; border-radius: 12px }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: 8px }
#chat .message-content :is(h1, h2, h3, h4) { font-size: 1.1em; margin: .6em 0 .3em !important }
#chat .message-content :is(ol, ul, table) { margin: .6em 0 }
#chat .thought-group { border: none; padding: 0; margin: .5rem 0 0; background: none; font-size: .8rem; opacity: .85 }
#chat .thought-group .arrow { display: none }
#message .input-container { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 4px }
#message textarea { border: none; background: none; box-shadow: none }
[role=grid] { border: none !important }
[role=grid] td { text-align: left !important; padding: .4rem .6rem !important }
.min_value, .max_value { color: var(--body-text-color) !important }
.gr-group:has(#message), .styler:has(#message) { background: none !important; border-radius: 12px !important }
@media (max-width: 640px) {
  #chat .examples { gap: .4rem; padding: .5rem }
  #chat .example { padding: .5rem .7rem }
}
"""
ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*"
    r"|gradio_api/(startup-events|heartbeat/[\w]+|queue/(join|data)|run/predict|cancel|reset/?|app_id/?))"
)
"""What the page's own script asks of Gradio; no upload, no file of the machine, no proxy, no programs' interface."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""An answer may name a picture somewhere else; fetching it would tell that place what was said here."""

logger = logging.getLogger(__name__)


def storage_secret(file: Path) -> str:
    """What browsers encrypt the conversations with that they keep: the same for every run of the page by this user.

    Kept in a file that only its owner may read. Where none can be kept, a new one and a warning.
    """
    with suppress(OSError):
        if (kept := file.read_text(encoding="ascii").strip()) != "":
            return kept
    made = secrets.token_hex(16)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)  # readable by its owner only
        with os.fdopen(descriptor, "w") as written:
            written.write(made)
        with suppress(FileExistsError):
            os.link(name, file)  # unlike a rename, it leaves alone what a page that started beside this one has made
        os.unlink(name)
        return file.read_text(encoding="ascii").strip() or made
    except OSError as error:
        logger.warning(
            "%s: the page's storage secret cannot be kept, got %s. Conversations in browsers are lost at the next "
            "start; make the directory writable.",
            file,
            error,
        )
        return made


def page(client: Client, secret: str) -> gr.Blocks:
    """The page. Every session asks through this one client; `secret` is what browsers encrypt conversations with."""

    async def answer(
        message: str,
        history: list[Any],
        instructions: str | None,
        max_tokens: float,
        temperature: float,
        top_p: float,
        request: gr.Request,
    ) -> AsyncIterator[list[dict[str, Any]]]:
        settings = Settings(instructions or "", int(max_tokens), temperature, top_p)
        session = hashlib.sha256(str(request.session_hash).encode()).hexdigest()[:32]
        async for update in client.ask(history, message, settings, session):
            yield shown(update)

    async def look() -> dict[str, Any]:
        trouble = await client.trouble()
        return gr.update(value=trouble, visible=bool(trouble))

    blocks: gr.Blocks
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        banner = gr.Markdown(visible=False, elem_id="banner")
        chat = gr.ChatInterface(
            answer,
            title=TITLE,
            description=DESCRIPTION,
            chatbot=gr.Chatbot(
                label=TITLE,
                height=HEIGHT_PX,
                show_label=False,
                buttons=["copy", "copy_all"],
                latex_delimiters=LATEX,
                allow_tags=False,
                sanitize_html=True,
                elem_id="chat",
            ),
            textbox=gr.Textbox(
                placeholder=PLACEHOLDER,
                show_label=False,
                label="Message",
                container=False,
                lines=1,
                max_lines=8,
                autofocus=True,
                submit_btn=True,
                stop_btn=True,
                elem_id="message",
            ),
            additional_inputs=[
                gr.Textbox(
                    value="",
                    label="Additional instructions",
                    info="Added after the identity, which is always there.",
                    lines=2,
                    elem_id="instructions",
                    render=False,
                ),
                slider("Maximum new tokens", 64, 8192, 4096, 64),
                slider("Temperature", 0, 1.5, 0.7, 0.05),
                slider("Top-p", 0, 1, 0.9, 0.05),
            ],
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            examples=[[text] for text in EXAMPLES],
            cache_examples=False,
            concurrency_limit=None,
            api_visibility="private",
            save_history=True,
            show_progress="hidden",
        )
        chat.new_chat_button.icon = None  # Gradio would serve it by its path on this machine
        # Gradio draws a secret for each process, and names the storage after how many components there are: a page
        # that was started again, or a new version of it, would find none of the conversations in a browser.
        chat.saved_conversations.secret = secret
        chat.saved_conversations.storage_key = STORAGE
        # Gradio empties the box's placeholder with every message; an answer's end, when it is saved, brings it back.
        chat.saved_conversations.change(
            lambda: gr.update(placeholder=PLACEHOLDER),
            outputs=chat.textbox,
            api_visibility="private",
            queue=False,
            show_progress="hidden",
        )
        blocks.load(look, outputs=banner, api_visibility="private", queue=False, show_progress="hidden")
        gr.Timer(LOOK_S).tick(look, outputs=banner, api_visibility="private", queue=False, show_progress="hidden")
    return blocks


def slider(label: str, least: float, most: float, value: float, step: float) -> gr.Slider:
    """A setting with the original page's range, default and step."""
    name = label.lower().replace(" ", "-")
    return gr.Slider(least, most, value=value, step=step, label=label, elem_id=name, render=False)


def shown(update: Update) -> list[dict[str, Any]]:
    """An update as messages of Gradio's chat: the text, and below it a note that is no part of the conversation."""
    messages: list[dict[str, Any]] = []
    if update.text or not update.note:
        messages.append({"role": "assistant", "content": update.text})
    if update.note:
        title = f"⚠ {update.note}" if update.trouble else update.note
        status = "pending" if update.waiting else "done"
        messages.append({"role": "assistant", "content": "", "metadata": {"title": title, "status": status}})
    return messages


def application(client: Client) -> FastAPI:
    """The page as an ASGI application: only what it needs of Gradio's routes, and nothing from elsewhere."""
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def door(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        if ROUTES.fullmatch(request.url.path) is None:
            return PlainTextResponse("There is nothing here.", 404)
        response = await forward(request)
        response.headers["content-security-policy"] = POLICY
        response.headers["x-content-type-options"] = "nosniff"
        response.headers["referrer-policy"] = "no-referrer"
        return response

    blocks = page(client, storage_secret(cache_directory() / "page-secret"))
    blocks.queue(max_size=None, default_concurrency_limit=None, api_open=False)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        # Its own colours are a little too pale to be read by everyone (WCAG asks for a contrast of 4.5).
        button_primary_background_fill="*primary_700",
        block_title_text_color="*primary_800",
        block_info_text_color="*neutral_600",
    )
    app.state.blocks = blocks
    gr.mount_gradio_app(
        app, blocks, "/", ssr_mode=False, show_error=False, footer_links=[], theme=theme, css=CSS, run_history=False
    )
    return app


class _Server(uvicorn.Server):
    """Ends the streams by which open tabs show that they are there; uvicorn would wait for them."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self.config.app.state.blocks.app.stop_event.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(client: Client, host: str, port: int) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    config = uvicorn.Config(application(client), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
    _Server(config).run()
