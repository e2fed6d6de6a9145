"""Videos of environments, written with imageio's ffmpeg or with OpenCV, whichever is installed."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.envs import processes

_WIDTH, _HEIGHT = 320, 240


class VideoWriter:
    """Writes RGB frames [Hi, Wi, 3] uint8 to an mp4 file."""

    def __init__(self, path: str | Path, fps: int):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._write, self._close = _imageio(str(path), fps) or _opencv(str(path), fps) or _missing()

    def add(self, frame: np.ndarray) -> None:
        """Appends a frame [Hi,Wi,3]."""
        self._write(np.asarray(frame, dtype=np.uint8))

    def close(self) -> None:
        self._close()


def _imageio(path: str, fps: int) -> tuple[Any, Any] | None:
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401 - imageio's mp4 writer
    except ImportError:
        return None
    writer = imageio.get_writer(path, fps=fps, macro_block_size=1)
    return writer.append_data, writer.close


def _opencv(path: str, fps: int) -> tuple[Any, Any] | None:
    try:
        import cv2
    except ImportError:
        return None
    writer: list[Any] = []

    def write(frame: np.ndarray) -> None:
        if not writer:
            size = frame.shape[1::-1]
            writer.append(cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), fps, size))
        writer[0].write(frame[..., ::-1])

    return write, lambda: [one.release() for one in writer]


def _missing() -> tuple[Any, Any]:
    raise UserError(
        'env.save_video=true needs a video writer: pip install "imageio[ffmpeg]" (or opencv-python-headless)'
    )


Load = Callable[[], Any]  # a function of a module, or a partial of one: it has to reach another process


class StateRecorder:
    """Films states of a MuJoCo model from a helper process.

    Rendering has a process of its own because Mesa's software renderer crashes in one that has loaded TensorFlow.
    """

    def __init__(self, load: Load, camera: dict[str, Any], path: str | Path, fps: int):
        """load: makes the model. camera: attributes of an MjvCamera."""
        chosen = os.environ.get("MUJOCO_GL")
        *alternatives, last = [chosen] if chosen else [""] if os.environ.get("DISPLAY") else ["egl", "osmesa"]
        for backend in alternatives:
            try:
                self._begin(load, camera, path, fps, backend)
            except UserError:
                continue
            return
        self._begin(load, camera, path, fps, last)

    def _begin(self, load: Load, camera: dict[str, Any], path: str | Path, fps: int, backend: str) -> None:
        # `load` in its pickled form: reading it imports MuJoCo, which looks at MUJOCO_GL then and never again
        arguments = pickle.dumps(load), camera, str(path), fps, backend
        self._backend = backend
        self._process, self._connection = processes.start(_film, *arguments)
        self._confirm()

    def add(self, state: np.ndarray) -> None:
        """state: full physics state [1+nq+nv], or several [n,1+nq+nv] to be seen side by side."""
        with contextlib.suppress(OSError):  # the process died; closing says why
            self._connection.send(state)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._confirm()
        self._connection.close()
        self._process.join()

    def _confirm(self) -> None:
        try:
            problem = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            problem = f"the rendering process ended with exit code {self._process.exitcode}"
        if isinstance(problem, UserError):
            raise problem
        if problem is not None:
            raise UserError(
                f"env.save_video=true: cannot render here with MUJOCO_GL={self._backend or 'unset'} ({problem}); "
                "set MUJOCO_GL=egl or MUJOCO_GL=osmesa and install that library (Debian: libegl1 or libosmesa6)"
            )


class StateViewer:
    """Shows states of a MuJoCo model in a window, as fast as they come, from a helper process (see StateRecorder).

    Closing the window ends the show, not the run.
    """

    def __init__(self, load: Load, camera: dict[str, Any]):
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("++env.render=true opens a window and there is no display: leave it out, or set DISPLAY")
        self._process, self._connection = processes.start(_show, load, camera)
        self._confirm()

    def add(self, state: np.ndarray) -> None:
        """state: full physics state [1+nq+nv]."""
        with contextlib.suppress(OSError):
            self._connection.send(state)

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _confirm(self) -> None:
        try:
            problem = self._connection.recv()
        except (EOFError, OSError):
            problem = "its process ended"
        if problem is not None:
            raise UserError(f"++env.render=true: cannot open a window ({problem}); leave it out, or check DISPLAY")


def _film(connection: Connection, load: bytes, camera: dict[str, Any], path: str, fps: int, backend: str) -> None:
    """Runs in the helper process: render each state received until None comes; answer None or what went wrong, once
    when ready and once when done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if backend:
        os.environ["MUJOCO_GL"] = backend  # before the first import of mujoco
    try:
        import mujoco

        writer, model = VideoWriter(path, fps), pickle.loads(load)()  # noqa: S301  (of the parent process)
        data, view = mujoco.MjData(model), mujoco.MjvCamera()
        _aim(view, camera)
        renderer = mujoco.Renderer(model, _HEIGHT, _WIDTH)
        connection.send(None)
        while (state := connection.recv()) is not None:
            frames = []
            for one in np.atleast_2d(state):
                mujoco.mj_setState(model, data, one, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
                mujoco.mj_forward(model, data)
                renderer.update_scene(data, view)
                frames.append(renderer.render())
            writer.add(np.concatenate(frames, axis=1))
        writer.close()
        connection.send(None)
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(
                error if isinstance(error, UserError) else f"{type(error).__name__}: {error}".split("\n")[0]
            )


def _show(connection: Connection, load: Load, camera: dict[str, Any]) -> None:
    """Runs in the helper process: show each state received until the other end hangs up or the window is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import mujoco
        import mujoco.viewer

        model = load()
        data = mujoco.MjData(model)
        with mujoco.viewer.launch_passive(model, data, show_left_ui=False, show_right_ui=False) as window:
            _aim(window.cam, camera)
            connection.send(None)
            while window.is_running():
                state = connection.recv()
                mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
                mujoco.mj_forward(model, data)
                window.sync()
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}".split("\n")[0])


def _aim(view: Any, camera: dict[str, Any]) -> None:
    for name, value in camera.items():
        if name == "lookat":
            view.lookat[:] = value
        else:
            setattr(view, name, value)
