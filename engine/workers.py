"""Workers: in a process that serves, one thread computes with all processors, and every other with its own alone.

Why: OpenMP keeps a team of workers for each thread that ever ran a parallel loop. Once they are more than there are
processors, GNU's runtime no longer lets a team wait awake between two loops (``gomp_throttled_spin_count_var``, GCC's
libgomp/config/linux/wait.h), and a decode step is some two hundred short loops: on two cores a step of one row took
51 ms instead of 38 beside the team of the thread that had loaded the base. A team ends with its thread.

Numbers of threads are torch's, which sets them for the calling thread and, as a default, for those that begin later.
Place in a request's way: none; once, at start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


def take_processors() -> int:
    """From now on this thread, and those that begin later, compute alone. How many processors this one had."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return num_threads


def leave_one_to_others() -> None:
    """Threads that begin later compute alone; this one goes on with what it has."""
    torch.get_num_threads()  # see begin_thread
    thread = threading.Thread(target=torch.set_num_threads, args=(1,))
    thread.start()
    thread.join()


def begin_thread(work: Callable[[], None], name: str, num_threads: int | None) -> threading.Thread:
    """A thread that computes with ``num_threads`` processors, begun; None gives it what others have."""
    has_begun = threading.Event()

    def run() -> None:
        torch.get_num_threads()  # a thread takes the default when it first asks, also over what it was set to
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        has_begun.set()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    has_begun.wait()
    _be_the_default()
    return thread


def run_apart(work: Callable[[], T], num_threads: int) -> T:
    """``work()``'s result or error, of a thread of its own, with which its team of workers ends."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the caller's
            outcome.set_exception(error)

    begin_thread(run, "lorikeet-start", num_threads).join()
    _be_the_default()  # the work may have begun threads, and so made its own number the default
    return outcome.result()


def _be_the_default() -> None:
    """This thread's number is again that of threads to come."""
    torch.set_num_threads(torch.get_num_threads())
