"""Where calls run: here, in processes beside this one, on a cluster of ray, or where the user says.

Every process gets the model and the data once. Each computes on one thread, so that what it finds
does not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .check import check_count
from .damage import Damage, Point, Question
from .errors import OptionError, first_line

Engine = Any  # None, "ray", or an object with a `map` as that of concurrent.futures
Answer = tuple[Point, "float | None"]
_Dumps = Callable[[Any], bytes]
_HERE: dict[str, Damage] = {}
_BUILDS = threading.Lock()


def check_engine(engine: Engine, workers: Any) -> None:
    """Raise `OptionError` for what nothing can run on."""
    check_count("workers", workers)
    if engine == "ray":
        _ray()
    elif isinstance(engine, str) or not (engine is None or callable(getattr(engine, "map", None))):
        raise OptionError(
            f"engine={engine!r} is not known",
            hint='None, "ray", or an object with a `map`, as the executors of concurrent.futures',
        )


def answers(damage: Damage, points: list[Point], workers: int, engine: Engine) -> Iterator[Answer]:
    """What `damage` says of each point, as it becomes known. `OptionError` where the model, the
    data or the loss cannot be sent to where they are needed."""
    if engine is None and (workers == 1 or len(points) < 2):
        return ((point, damage(point)) for point in points)
    if engine == "ray":  # its pickle takes what stands in a script, and lambdas
        return _on_ray(_Job(damage.asked, _ray().cloudpickle.dumps), points, workers)
    job = _Job(damage.asked, pickle.dumps)
    if engine is None:
        return _in_processes(job, points, min(workers, len(points)))
    return zip(points, engine.map(job, points), strict=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The sums of several threads are rounded otherwise than those of one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Job:
    """A `Damage` that can be sent away; it is unpacked once in a process."""

    def __init__(self, question: Question, dumps: _Dumps):
        self.packed = _packed(question, dumps)
        self.key = hashlib.sha256(self.packed).hexdigest()

    def __call__(self, point: Point) -> float | None:
        return self.unpack()(point)

    @torch.inference_mode(False)
    def unpack(self) -> Damage:
        with _BUILDS:
            if self.key not in _HERE:
                torch.set_num_threads(1)
                _HERE.clear()  # a worker that is used again holds one model, not all it ever had
                _HERE[self.key] = Damage(pickle.loads(self.packed))
            return _HERE[self.key]


def _packed(question: Question, dumps: _Dumps) -> bytes:
    """The question as bytes; the error names the part that cannot be sent."""
    try:
        return dumps(question)
    except Exception as error:  # what reduces itself may raise anything
        what = next(
            (name for name in vars(question) if not _can_go(getattr(question, name), dumps)),
            "model",
        )
        raise OptionError(
            f"the {what} cannot be sent to another process: {first_line(error)}",
            hint="define its classes and functions at the top of a module that can be imported, "
            "not in a function or as a lambda; or workers=1",
        ) from error


def _can_go(part: Any, dumps: _Dumps) -> bool:
    try:
        dumps(part)
    except Exception:
        return False
    return True


# -- processes -------------------------------------------------------------------------------------


def _in_processes(job: _Job, points: Iterable[Point], workers: int) -> Iterator[Answer]:
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(job,)
    )
    try:
        asked = {pool.submit(_answer, job.key, point): point for point in points}
        for done in as_completed(asked):
            yield asked[done], done.result()
    except BrokenProcessPool:
        raise OptionError(
            "a worker process ended before its work was done",
            hint='a script needs `if __name__ == "__main__":` before what it does, and memory for '
            "a model a worker; or workers=1",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(job: _Job) -> None:
    job.unpack()


def _answer(key: str, point: Point) -> float | None:
    return _HERE[key](point)


# -- ray -------------------------------------------------------------------------------------------


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        hint = "pip install 'fxprune[ray]'"
        raise OptionError('engine="ray" needs ray, which is not installed', hint=hint) from None


def _on_ray(job: _Job, points: Iterable[Point], workers: int) -> Iterator[Answer]:
    """On a cluster that is there, or one of this machine with as many processes as asked."""
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # what can be imported here, can be there
        ray.init(
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": path},
        )
    try:
        sent, ask = ray.put(job), ray.remote(max_retries=0)(_called)
        asked = {ask.remote(sent, point): point for point in points}
        waiting = list(asked)
        while waiting:
            done, waiting = ray.wait(waiting)
            for each in done:
                yield asked[each], ray.get(each)
    finally:
        if own:
            ray.shutdown()


def _called(job: _Job, point: Point) -> float | None:
    return job(point)
