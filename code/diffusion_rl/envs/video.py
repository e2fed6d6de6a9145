"""Videos of environments, written with imageio's ffmpeg or with OpenCV, whichever is installed."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_rl.core.errors import UserError
from diffusion_rl.core.files import atomic_file
from diffusion_rl.envs import processes

if TYPE_CHECKING:
    from diffusion_rl.envs.locomotion import LocomotionPhysics, LocomotionVectorEnv

_WIDTH, _HEIGHT = 320, 240


class VideoWriter:
    """Writes RGB frames [Hi, Wi, 3] uint8 to an mp4 file; to a png file one below the other."""

    def __init__(self, path: str | Path, fps: int):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._write, self._close = (
            _sheet(str(path)) or _imageio(str(path), fps) or _opencv(str(path), fps) or _missing()
        )

    def add(self, frame: np.ndarray) -> None:
        """Appends a frame [Hi,Wi,3]."""
        self._write(np.asarray(frame, dtype=np.uint8))

    def close(self) -> None:
        self._close()


def _sheet(path: str) -> tuple[Any, Any] | None:
    if not path.endswith(".png"):
        return None
    rows: list[np.ndarray] = []

    def close() -> None:
        from matplotlib.image import imsave

        with atomic_file(path) as file:
            imsave(file, np.concatenate(rows), format="png")

    return rows.append, close


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

    return write, lambda: [opened.release() for opened in writer]


def _missing() -> tuple[Any, Any]:
    raise UserError(
        'env.save_video=true needs a video writer: pip install "imageio[ffmpeg]" (or opencv-python-headless)'
    )


Load = Callable[[], Any]  # a function of a module, or a partial of one: it has to reach another process


class _StateProcess:
    """A helper process that is sent states of a MuJoCo model; it answers None, or what went wrong.

    Rendering has a process of its own because Mesa's software renderer crashes in one that has loaded TensorFlow.
    """

    failure = ""  # of messages, with the reason in the place of {reason}

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process, self._connection = processes.start(target, *arguments)
        self._confirm()

    def add(self, state: np.ndarray) -> None:
        """Sends a full physics state [1+nq+nv]."""
        with contextlib.suppress(OSError):  # the process died; closing says why
            self._connection.send(state)

    def _confirm(self) -> None:
        try:
            problem = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            problem = f"the rendering process ended with exit code {self._process.exitcode}"
        if isinstance(problem, UserError):
            raise problem
        if problem is not None:
            raise UserError(self.failure.format(reason=problem))

    def close(self) -> None:
        self._connection.close()
        self._process.join()


class StateRecorder(_StateProcess):
    """Films states of a MuJoCo model; `add` also takes several, [n,1+nq+nv], to be seen side by side.

    Args:
        load: makes the model.
        camera: attributes of an MjvCamera.
        path, fps: of the video.

    Raises:
        UserError: videos cannot be made here.
    """

    def __init__(self, load: Load, camera: dict[str, Any], path: str | Path, fps: int):
        chosen = os.environ.get("MUJOCO_GL")
        *alternatives, last = [chosen] if chosen else [""] if os.environ.get("DISPLAY") else ["egl", "osmesa"]
        # `load` in its pickled form: reading it imports MuJoCo, which looks at MUJOCO_GL then and never again
        arguments = pickle.dumps(load), camera, str(path), fps
        for backend in alternatives:
            with contextlib.suppress(UserError):
                self._begin(*arguments, backend)
                return
        self._begin(*arguments, last)

    def _begin(self, load: bytes, camera: dict[str, Any], path: str, fps: int, backend: str) -> None:
        self.failure = (
            f"cannot render here with MUJOCO_GL={backend or 'unset'} ({{reason}}); "
            "set MUJOCO_GL=egl or MUJOCO_GL=osmesa and install that library (Debian: libegl1 or libosmesa6)"
        )
        self._start(_film, load, camera, path, fps, backend)

    def close(self) -> None:
        """Completes the video."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._confirm()
        super().close()


_NO_WINDOW = "env.render=true: cannot open a window ({reason}); leave it out, or check DISPLAY"


def require_display() -> None:
    """Raises UserError where no window can be opened."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("env.render=true opens a window and there is no display: leave it out, or set DISPLAY")


class Window:
    """Shows a MuJoCo simulation of this process, as fast as it goes; closing the window ends the show, not the run.

    Args:
        model, data: MuJoCo's own objects.
        camera: attributes of an MjvCamera.
        hidden: groups of shapes that are not shown.

    Raises:
        UserError: no window can be opened here.
    """

    def __init__(self, model: Any, data: Any, camera: dict[str, Any], hidden: Sequence[int] = ()):
        require_display()
        try:
            import mujoco.viewer

            self._window = mujoco.viewer.launch_passive(model, data, show_left_ui=False, show_right_ui=False)
        except Exception as error:  # a library is missing, or the display refuses
            raise UserError(_NO_WINDOW.format(reason=error)) from error
        _aim(self._window.cam, camera)
        for group in hidden:
            self._window.opt.geomgroup[group] = 0

    def is_open(self) -> bool:
        """Returns whether the user has left it open."""
        return self._window.is_running()

    def show(self) -> None:
        """Shows the present state."""
        if self.is_open():
            self._window.sync()

    def close(self) -> None:
        self._window.close()


class StateViewer(_StateProcess):
    """Shows states of a MuJoCo model in a `Window`. Arguments as of `StateRecorder`."""

    failure = _NO_WINDOW

    def __init__(self, load: Load, camera: dict[str, Any]):
        require_display()
        self._start(_show, load, camera)


@contextlib.contextmanager
def _answering(connection: Connection) -> Iterator[None]:
    """Surrounds the work of a helper process: answers what goes wrong in a line; ends when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        yield
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        line = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}".split("\n")[0]
        with contextlib.suppress(OSError):
            connection.send(line)


def _film(connection: Connection, load: bytes, camera: dict[str, Any], path: str, fps: int, backend: str) -> None:
    """Runs in the helper process: renders each state received until None comes.

    Answers once when ready and once when done.
    """
    if backend:
        os.environ["MUJOCO_GL"] = backend  # before the first import of mujoco
    with _answering(connection):
        import mujoco

        writer, model = VideoWriter(path, fps), pickle.loads(load)()  # noqa: S301  (of the parent process)
        data, view = mujoco.MjData(model), mujoco.MjvCamera()
        _aim(view, camera)
        renderer = mujoco.Renderer(model, _HEIGHT, _WIDTH)
        connection.send(None)
        while (states := connection.recv()) is not None:
            frames = []
            for state in np.atleast_2d(states):
                _put(model, data, state)
                renderer.update_scene(data, view)
                frames.append(renderer.render())
            writer.add(np.concatenate(frames, axis=1))
        writer.close()
        connection.send(None)


def _show(connection: Connection, load: Load, camera: dict[str, Any]) -> None:
    """Runs in the helper process: shows each state received until the other end hangs up or the window is closed."""
    with _answering(connection):
        import mujoco

        model = load()
        data = mujoco.MjData(model)
        with contextlib.closing(Window(model, data, camera)) as window:
            connection.send(None)
            while window.is_open():
                _put(model, data, connection.recv())
                window.show()


def _put(model: Any, data: Any, state: np.ndarray) -> None:
    """Puts a simulation into a full physics state [1+nq+nv]."""
    import mujoco

    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
    mujoco.mj_forward(model, data)


def _aim(view: Any, camera: dict[str, Any]) -> None:
    for name, value in camera.items():
        if name == "lookat":
            view.lookat[:] = value
        else:
            setattr(view, name, value)


# ---------- films of plans: left what was planned, right what the simulator makes of the planned actions ----------


def planned_states(physics: LocomotionPhysics, observations: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns states [H,1+nq+nv] of planned observations [H,O]; the forward position, which they lack, begins at
    `start`."""
    nq = physics.model.nq
    states = np.zeros((len(observations), physics.state_size))
    states[:, 2 : 1 + nq], states[:, 1 + nq :] = observations[:, : nq - 1], observations[:, nq - 1 :]
    states[:, 1] = start[1] + physics.dt * np.append(0, np.cumsum(observations[:-1, nq - 1]))
    return states


def film_plan(env: LocomotionVectorEnv, row: int, observations: np.ndarray, actions: np.ndarray, path: Path) -> None:
    """Films a plan, observations [H,O] and actions [H,A], made in the present state of one environment.

    Raises UserError where videos cannot be made.
    """
    state = env.get_state()
    start, warm = state["physics"][row], state["warmstart"][row]
    simulated = env.physics.step(start[None], warm[None], np.clip(actions, -1, 1)[None]).states[0]
    planned = planned_states(env.physics, observations, start)
    recorder = env.recorder(str(path))
    for pair in zip(planned, [start, *simulated[:-1]], strict=True):
        recorder.add(np.stack(pair))
    recorder.close()
