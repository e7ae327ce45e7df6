"""The chat page: Gradio's chat interface over `chat_page.client`, and the few routes of Gradio that it needs.

It holds no model and no conversation: conversations are stored in each user's browser. It knows nothing of engines.
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

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

from borg_serve.chat_page.client import ChatOptions, Client, Update
from borg_serve.config import cache_directory

__all__ = ["application", "page", "serve", "storage_secret"]

FOLDER = Path(__file__).parent
TITLE = "Borg Merge v1"
PLACEHOLDER = "Ask the collective. Enter sends."
STORAGE = "borg-serve-conversations"
"""The name of the conversations in a browser's storage."""
READY_EVERY_S = 10
LATEX: list[dict[str, str | bool]] = [
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]
ROUTES = re.compile(
    r"/(|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*"
    r"|gradio_api/(startup-events|heartbeat/[\w]+|queue/(join|data)|run/predict|cancel|reset/?|app_id/?))"
)
"""The routes that the page's own script uses: no upload, no file of the machine, no proxy, no API for programs."""
HEADERS = {
    # An answer may contain the address of a picture elsewhere. Loading it would tell that host what was said here.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

logger = logging.getLogger(__name__)


def storage_secret(file: Path) -> str:
    """Return the secret that browsers encrypt their conversations with, the same for every page of this user.

    It is kept in a file that only its owner may read. If that fails, each start has a new one and logs a warning.
    """
    made = secrets.token_hex(16)
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent) as written, suppress(FileExistsError):
                written.write(made)
                written.flush()
                os.link(written.name, file)  # unlike a rename, it keeps what a page that started meanwhile has made
        return file.read_text(encoding="ascii").strip() or made
    except OSError as error:
        lost = "Conversations in browsers are lost at the next start; make the directory writable."
        logger.warning("%s: the page's storage secret cannot be kept, got %s. %s", file, error, lost)
        return made


def page(client: Client, secret: str) -> gr.Blocks:
    """Build the page. Every session uses this one client; browsers encrypt conversations with `secret`."""

    async def answer(
        message: str,
        history: list[Any],
        instructions: str | None,
        max_tokens: float,
        temperature: float,
        top_p: float,
        request: gr.Request,
    ) -> AsyncIterator[list[dict[str, Any]]]:
        options = ChatOptions(instructions or "", int(max_tokens), temperature, top_p)
        # Hashed: who knows Gradio's own name of a session can read its queue.
        session = hashlib.sha256(str(request.session_hash).encode()).hexdigest()[:32]
        async for update in client.ask(history, message, options, session):
            yield shown(update)

    async def look() -> dict[str, Any]:
        trouble = await client.trouble()
        return gr.update(value=trouble, visible=bool(trouble))

    blocks: gr.Blocks
    with gr.Blocks(title=TITLE, fill_width=True) as blocks:
        banner = gr.Markdown(visible=False, elem_id="banner")
        chat = gr.ChatInterface(
            answer,
            title=TITLE,
            description=_read("about.md"),
            chatbot=_history(),
            textbox=_message_box(),
            additional_inputs=_settings(),
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            examples=[[text] for text in _read("examples.txt").splitlines()],
            cache_examples=False,
            concurrency_limit=None,
            api_visibility="private",
            save_history=True,
            show_progress="hidden",
        )
        chat.new_chat_button.icon = None  # Gradio would serve it by its path on this machine
        # Gradio's own secret and storage name differ between processes: a restarted page would lose the conversations.
        chat.saved_conversations.secret = secret
        chat.saved_conversations.storage_key = STORAGE
        quiet: dict[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        # Gradio empties the box's placeholder with every message. This brings it back when the answer is saved.
        restore = gr.update(placeholder=PLACEHOLDER)
        chat.saved_conversations.change(lambda: restore, outputs=chat.textbox, **quiet)
        gr.on([blocks.load, gr.Timer(READY_EVERY_S).tick], look, outputs=banner, **quiet)
    return blocks


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _history() -> gr.Chatbot:
    return gr.Chatbot(
        label=TITLE,
        height=500,
        show_label=False,
        buttons=["copy", "copy_all"],
        latex_delimiters=LATEX,
        allow_tags=False,
        elem_id="chat",
    )


def _message_box() -> gr.Textbox:
    return gr.Textbox(
        placeholder=PLACEHOLDER,
        label="Message",
        container=False,
        max_lines=8,
        autofocus=True,
        submit_btn=True,
        stop_btn=True,
        elem_id="message",
    )


def _settings() -> list[str | gr.components.Component]:
    """The ranges, defaults and steps of the original page."""
    note = "Added after the identity, which is always there."
    return [
        gr.Textbox(label="Additional instructions", info=note, lines=2, elem_id="instructions", render=False),
        _slider("Maximum new tokens", 64, 8192, 4096, 64),
        _slider("Temperature", 0, 1.5, 0.7, 0.05),
        _slider("Top-p", 0, 1, 0.9, 0.05),
    ]


def _slider(label: str, least: float, most: float, value: float, step: float) -> gr.Slider:
    name = label.lower().replace(" ", "-")
    return gr.Slider(least, most, value=value, step=step, label=label, elem_id=name, render=False)


def shown(update: Update) -> list[dict[str, Any]]:
    """Convert an update to Gradio's messages: the text, and below it a note that is no part of the conversation."""
    messages: list[dict[str, Any]] = []
    if update.text or not update.note:
        messages.append({"role": "assistant", "content": update.text})
    if update.note:
        title = f"⚠ {update.note}" if update.trouble else update.note
        status = "pending" if update.waiting else "done"
        messages.append({"role": "assistant", "content": "", "metadata": {"title": title, "status": status}})
    return messages


def application(client: Client) -> FastAPI:
    """Build the ASGI application: the page, on the routes of Gradio that it needs."""
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def only_known_routes(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        if ROUTES.fullmatch(request.url.path) is None:
            return PlainTextResponse("There is nothing here.", 404)
        response = await forward(request)
        response.headers.update(HEADERS)
        return response

    blocks = page(client, storage_secret(cache_directory() / "page-secret"))
    blocks.queue(default_concurrency_limit=None, api_open=False)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        # The theme's own colours have a contrast below 4.5, which WCAG asks for.
        button_primary_background_fill="*primary_700",
        block_title_text_color="*primary_800",
        block_info_text_color="*neutral_600",
    )
    app.state.blocks = blocks
    look: dict[str, Any] = {"theme": theme, "css_paths": FOLDER / "page.css", "footer_links": []}
    gr.mount_gradio_app(app, blocks, "/", ssr_mode=False, show_error=False, run_history=False, **look)
    return app


class _Server(uvicorn.Server):
    """Ends the streams that open tabs hold to show that they live. uvicorn alone would wait for them."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self.config.app.state.blocks.app.stop_event.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(client: Client, host: str, port: int) -> None:
    """Serve the page until SIGINT or SIGTERM."""
    config = uvicorn.Config(application(client), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
    _Server(config).run()
