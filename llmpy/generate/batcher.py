"""A thread that continues the texts of many requests in one batch.

A text gets a place when one is free, in the order of submission, and leaves it when it ends or is cancelled. Between
two tokens of the others at most one prompt is read (`Generation.logits`), so a long one delays them once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import LlmpyError
from .generation import Generation, Text, Token


class Event(NamedTuple):
    """What a step added to a text: the piece of text that it completed, the token, or an error, which ends the text."""

    text: Text
    piece: str = ""
    token: Token | None = None
    ended: str = ""
    error: Exception | None = None


class Batcher:
    """The owner of a generation; `waiting` texts may wait for a place. Only its thread calls the model.

    `deliver` receives the events of each step, in that thread, and must not block. A text that is cancelled may have a
    last event.
    """

    def __init__(self, generation: Generation, waiting: int, deliver: Callable[[list[Event]], object]) -> None:
        self._limit = len(generation.free) + waiting
        self._generation, self._deliver = generation, deliver
        self._waiting: deque[Text] = deque()
        self._cancelled: set[Text] = set()
        self._changed = threading.Condition()
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.thread.start()

    @property
    def counts(self) -> tuple[int, int]:
        """How many texts have a place, and how many wait for one."""
        return len(self._generation.texts), len(self._waiting)

    def submit(self, texts: Sequence[Text]) -> None:
        """Continue these texts. Raises LlmpyError if not all of them may wait."""
        with self._changed:
            if self._closed:
                raise LlmpyError("serve.closing", "the server is shutting down", "Try again later")
            if sum(self.counts) + len(texts) > self._limit:
                raise LlmpyError("serve.busy", f"{self.counts[1]} texts are waiting already", "Try again later")
            self._waiting.extend(texts)
            self._changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """Stop continuing these texts, where they have not ended."""
        with self._changed:
            self._cancelled.update(text for text in texts if not text.ended)
            self._changed.notify()

    def close(self) -> None:
        """End all texts with an error after the present step, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while self._admit():
            try:
                # One after another: in two threads they took as long (dev/LOG.md#sampling-many-texts).
                events = [self._add(text, logits) for text, logits in self._generation.logits(prefills=1)]
            except Exception as error:  # of a kernel, or too little memory: none of these texts can continue
                events = [self._failed(text, error) for text in [*self._generation.texts]]
            self._deliver(events)
        closing = LlmpyError("serve.closing", "the server is shutting down", "Try again later")
        self._deliver([self._failed(text, closing) for text in [*self._generation.texts, *self._waiting]])

    def _admit(self) -> bool:
        """Free the places of cancelled texts, give those that are free; wait for a text. Return False when closed."""
        generation = self._generation
        with self._changed:
            while not self._closed:
                for text in self._cancelled & {*generation.texts}:
                    generation.leave(text)
                if self._cancelled:
                    self._waiting = deque(text for text in self._waiting if text not in self._cancelled)
                    self._cancelled.clear()
                while self._waiting and generation.free:
                    generation.join(self._waiting.popleft())
                if generation.texts:
                    return True
                self._changed.wait()
            return False

    def _add(self, text: Text, logits: np.ndarray) -> Event:
        try:
            piece = self._generation.add(text, logits)
        except Exception as error:  # only of this text
            return self._failed(text, error)
        return Event(text, piece, text.added[-1], text.ended)

    def _failed(self, text: Text, error: Exception) -> Event:
        text.ended = "error"
        if text in self._generation.texts:
            self._generation.leave(text)
        return Event(text, ended=text.ended, error=error)
