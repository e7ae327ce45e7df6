"""The user that measures: starts each session of its process when it is due, sends requests, reads answers by line.

Every moment is stamped here. It does not draw arrivals, judge or report.
"""

import json
import time
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import FastHttpUser, task

from loadtests.generator.dispatch import Profile, inbox, keep, now_us
from loadtests.generator.records import Outcome, Record
from loadtests.generator.sse import Stream, refusal
from loadtests.generator.workload import Session, Turn, chat, message

__all__ = ["MeasuringUser", "Profile"]

PATH = "/v1/chat/completions"


class MeasuringUser(FastHttpUser):
    """One process's share of the arrivals, each in a greenlet of its own."""

    concurrency = 100_000  # connections; the server's limits are what is measured, not the client's
    network_timeout = connection_timeout = 3600.0  # patience is ours

    def on_start(self) -> None:
        self.greenlets = Group()
        options = self.environment.parsed_options
        assert options is not None
        self.options = options
        self.system = Path(options.system).read_text(encoding="utf-8").strip() if options.system else None
        self.headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {options.api_key}",
            "Connection": "close",  # a pooled connection that the server just closed would fail a request
        }

    def on_stop(self) -> None:
        self.greenlets.kill()

    @task
    def phase(self) -> None:
        """Wait for a phase, then start each of its sessions when it is due."""
        handed = inbox.get()
        worker = max(0, getattr(self.environment.runner, "worker_index", 0))
        for index, due_s, turns in handed["sessions"]:
            if index % handed["of"] != worker % handed["of"]:
                continue
            session = Session(index, due_s, [Turn(*turn) for turn in turns])
            due_us = handed["begin_us"] + round(due_s * 1e6)
            gevent.sleep(max(0.0, (due_us - now_us()) / 1e6))
            self.greenlets.spawn(self.session, session, handed["phase"], handed["begin_us"], worker)

    def session(self, session: Session, phase: int, begin_us: int, worker: int) -> None:
        """One request, or one conversation: each turn carries all before it."""
        seed = self.options.seed
        history: list[dict[str, str]] = []
        due_us = begin_us + round(session.due_s * 1e6)
        for number, turn in enumerate(session.turns):
            stamp = f"{time.time_ns()} " if self.options.cache == "unshared" else ""
            text = message(seed, phase, session.index, number, turn.prompt_tokens)
            history.append({"role": "user", "content": text})
            messages = [dict(entry) for entry in history]
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": self.system})
            messages[0]["content"] = stamp + messages[0]["content"]
            last = number + 1 == len(session.turns)
            place = (phase, session.index, number, worker, last)
            body = chat(self.options.model, messages, turn.output_tokens)
            record, answer = self.request(place, due_us, begin_us, body)
            if not last and not record.ok:  # a conversation ends with its first failure
                record = replace(record, last_of_session=True)
            self.keep(record)
            if not record.ok or last:
                return
            history.append({"role": "assistant", "content": answer})
            think_s = session.turns[number + 1].think_s
            due_us = begin_us + record.t_end_us + round(think_s * 1e6)
            gevent.sleep(max(0.0, (due_us - now_us()) / 1e6))

    def request(
        self, place: tuple[int, int, int, int, bool], due_us: int, begin_us: int, body: dict[str, Any]
    ) -> tuple[Record, str]:
        """Send one request and read its answer by line: the reader that does not wait for a full block."""
        data = json.dumps(body)
        stream = Stream()
        status = 0
        outcome, detail = Outcome.UNREACHABLE, ""
        t_send = now_us()
        patience = gevent.Timeout(self.options.patience)
        patience.start()
        try:
            response = self.client.post(PATH, data=data, headers=self.headers, stream=True, catch_response=True)
            status = response.status_code
            if status == 0:
                error = getattr(response, "error", None)
                outcome = Outcome.TIMEOUT if error is patience else Outcome.UNREACHABLE
                detail = type(error).__name__
            elif status != 200:
                outcome, detail = refusal(status, response.content or b"")
            else:
                outcome, detail = self.read(response, stream)
        except gevent.Timeout as expired:
            if expired is not patience:
                raise
            outcome, detail = Outcome.TIMEOUT, f"{self.options.patience:g} s"
        finally:
            patience.close()
        usage = stream.usage
        details = usage.get("prompt_tokens_details") or {}
        record = Record(
            *place,
            t_sched_us=due_us - begin_us,
            t_send_us=t_send - begin_us,
            t_first_us=None if stream.first_us is None else stream.first_us - begin_us,
            t_last_us=None if stream.last_us is None else stream.last_us - begin_us,
            t_end_us=now_us() - begin_us,
            itl_us=stream.itl_us,
            prompt_tokens=usage.get("prompt_tokens", 0),
            cached_tokens=details.get("cached_tokens"),
            output_tokens=usage.get("completion_tokens", 0),
            outcome=outcome,
            status=status,
            detail=detail,
        )
        return record, "".join(stream.text)

    def read(self, response: Any, stream: Stream) -> tuple[Outcome, str]:
        """Feed the stream each line with the moment it was received.

        geventhttpclient's own `readline` spins for ever when the connection ends inside the answer (2.6.1), and
        Locust's `iter_lines` waits for blocks of 1,024 bytes.
        """
        raw = response._response
        try:
            while True:
                now = now_us()
                while (end := raw._body_buffer.find(b"\n")) >= 0:
                    stream.feed(bytes(raw._body_buffer[:end]), now)
                    del raw._body_buffer[: end + 1]
                if raw.message_complete:
                    return stream.outcome()
                received = raw._sock.recv(65536)
                if not received:
                    raise ConnectionError("the connection ended")
                raw.feed(received)
        except (OSError, ValueError, HTTPException) as error:
            return stream.outcome(broken=type(error).__name__)
        finally:
            raw.release()

    def keep(self, record: Record) -> None:
        """For the report, and for Locust's own tables: TTFT, TPOT and E2E as requests of their own."""
        keep(self.environment, record)
        error = None if record.ok else RuntimeError(f"{record.outcome}: {record.detail}")
        values: dict[str, float | None] = {"E2E": record.e2e_ms(True)}
        if record.ok:
            values |= {"TTFT": record.ttft_ms(True), "TPOT": record.tpot_ms()}
        name = "chat" if record.phase >= 0 else "warm-up"
        for kind, value in values.items():
            if value is not None:
                common: dict[str, Any] = {"request_type": kind, "name": name, "response_time": value}
                self.environment.events.request.fire(**common, response_length=0, exception=error, context={})
