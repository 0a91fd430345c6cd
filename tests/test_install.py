"""Each way of docs/installing.md to install Safelight works in an empty folder, and ends in an image."""

from __future__ import annotations

import http.client
import http.server
import os
import select
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from safelight.version import VERSION

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("install")]

HOME = Path(__file__).parents[1]
CONSTRAINTS = HOME / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 1800.0
"""A way may take this long."""

PIP_TO_UV = {"PIP_INDEX_URL": "UV_DEFAULT_INDEX", "PIP_FIND_LINKS": "UV_FIND_LINKS", "PIP_CERT": "SSL_CERT_FILE"}
"""What tools/install.sh does for uv: uv does not read pip's variables."""

Variables = dict[str, str]


def run(*command: str | Path, env: Variables, cwd: Path | None = None) -> str:
    """Run a command and return its output. A failed command shows its whole output."""
    done = subprocess.run(
        [str(word) for word in command],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def makes_an_image(safelight: Path, folder: Path, env: Variables) -> None:
    """The command says its version, and draws by a starter checkpoint."""
    assert run(safelight, "--version", env=env).strip() == f"safelight {VERSION}"
    run(safelight, "generate", "red apple", "-m", "starter-noto", "--steps", "1", "--out", folder / "out", env=env)
    assert len(list((folder / "out").glob("*.png"))) == 1


def virtual_environment(folder: Path, env: Variables, *packages: str) -> Path:
    """Make a virtual environment with ``packages``, and return the folder of its commands."""
    run(sys.executable, "-m", "venv", folder, env=env)
    if packages:
        run(folder / "bin/python", "-m", "pip", "install", "--quiet", *packages, env=env)
    return folder / "bin"


@pytest.fixture
def env(tmp_path: Path) -> Variables:
    """The variables of a user who has never used Safelight; settings of indexes and proxies stay."""
    ours = ("SAFELIGHT_", "VIRTUAL_ENV", "PYTHON", "COVERAGE", "PYTEST", "MAKE", "MFLAGS")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    for pips, uvs in PIP_TO_UV.items():
        if pips in variables:
            variables.setdefault(uvs, variables[pips].replace(" ", ","))
    path = os.pathsep.join(p for p in variables["PATH"].split(os.pathsep) if p != str(Path(sys.executable).parent))
    return variables | {"PATH": path, "SAFELIGHT_ROOT": str(tmp_path / "root"), "PYTHON": sys.executable}


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the tools that come from the index: one environment each."""
    return tmp_path_factory.mktemp("tools")


def tool(name: str, tools: Path, env: Variables) -> Path:
    """Return the command ``name``: the user's, or one from the index. Skip the test if there is neither."""
    if found := shutil.which(name, path=env["PATH"]):
        return Path(found)
    folder = tools / name
    if not (folder / "bin" / name).exists():
        try:
            virtual_environment(folder, env, name)
        except AssertionError as error:
            pytest.skip(f"{name} is missing, and the index does not give it: {error}")
    return folder / "bin" / name


def cpu_index() -> bool:
    """Whether PyTorch's CPU builds can be had from their own index, as docs/installing.md recommends."""
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=15) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def needs_cpu_index() -> bool:
    return not Path("/proc/driver/nvidia/version").exists() and cpu_index()


def clone(folder: Path, env: Variables) -> Path:
    run("git", "clone", "--quiet", HOME, folder / "safelight", env=env)
    return folder / "safelight"


def test_a_clone_with_make_and_pip(tmp_path: Path, env: Variables) -> None:
    home = clone(tmp_path, env)
    said = run("make", "install", "INSTALLER=pip", cwd=home, env=env)
    assert said.index("pip downloads") < said.index("touch .venv/.installed")
    makes_an_image(home / ".venv/bin/safelight", tmp_path, env)


def test_a_clone_with_make_and_uv_and_a_wheel_in_an_empty_environment(
    tmp_path: Path, env: Variables, tools: Path, needs_cpu_index: bool
) -> None:
    home = clone(tmp_path, env)
    env["PATH"] = f"{tool('uv', tools, env).parent}{os.pathsep}{env['PATH']}"
    # Without it, pip is used where only pip's configuration names an index.
    env["INSTALLER"] = "uv"
    assert "uv downloads" in run("make", "install", cwd=home, env=env)
    makes_an_image(home / ".venv/bin/safelight", tmp_path / "clone", env)
    run("make", "dist", cwd=home, env=env)
    for package in ("safelight", "safelight_starter"):
        assert len(list((home / "dist").glob(f"{package}-{VERSION}.tar.gz"))) == 1
    wheels = [
        next((home / "dist").glob(f"{package}-{VERSION}-*.whl")) for package in ("safelight", "safelight_starter")
    ]
    with_extras = f"{wheels[0]}[all]"
    extra = ["--extra-index-url", CPU_INDEX] if needs_cpu_index else []
    empty = virtual_environment(tmp_path / "empty", env)
    run(empty / "pip", "install", "--quiet", "-c", CONSTRAINTS, *extra, with_extras, wheels[1], env=env)
    makes_an_image(empty / "safelight", tmp_path / "wheel", env)


def test_uv_tool_install(tmp_path: Path, env: Variables, tools: Path, needs_cpu_index: bool) -> None:
    uv, commands = tool("uv", tools, env), tmp_path / "bin"
    env |= {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(commands)}
    extra = ["--torch-backend", "cpu"] if needs_cpu_index else []
    run(
        uv,
        "tool",
        "install",
        "--python",
        sys.executable,
        "-c",
        CONSTRAINTS,
        *extra,
        "--with",
        HOME / "starter",
        f"{HOME}[all]",
        env=env,
    )
    makes_an_image(commands / "safelight", tmp_path, env)
    run(uv, "tool", "uninstall", "safelight", env=env)
    assert not (commands / "safelight").exists()


def test_pipx_install(tmp_path: Path, env: Variables, tools: Path, needs_cpu_index: bool) -> None:
    pipx, commands = tool("pipx", tools, env), tmp_path / "bin"
    env |= {"PIPX_HOME": str(tmp_path / "pipx"), "PIPX_BIN_DIR": str(commands), "PIPX_MAN_DIR": str(tmp_path / "man")}
    arguments = f"-c {CONSTRAINTS}" + (f" --extra-index-url {CPU_INDEX}" if needs_cpu_index else "")
    run(pipx, "install", "--python", sys.executable, f"--pip-args={arguments}", f"{HOME}[all]", env=env)
    run(pipx, "inject", "safelight", HOME / "starter", env=env)
    makes_an_image(commands / "safelight", tmp_path, env)
    run(pipx, "uninstall", "safelight", env=env)
    assert not (commands / "safelight").exists()


class _Tunnel(http.server.BaseHTTPRequestHandler):
    """A proxy that only forwards TLS connections, and records where to."""

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        self.server.hosts.append(host)  # type: ignore[attr-defined]
        try:
            there = socket.create_connection((host, int(port)), timeout=30)
        except OSError:
            self.send_error(502)
            return
        self.send_response(200)
        self.end_headers()
        pairs = {self.connection: there, there: self.connection}
        with there:
            while ready := select.select(list(pairs), [], [], 60)[0]:
                for one in ready:
                    if not (data := one.recv(65536)):
                        return
                    pairs[one].sendall(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Tunnel)
        self.hosts: list[str] = []


@pytest.fixture
def proxy() -> Generator[_Server]:
    server = _Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_make_uses_the_proxy(tmp_path: Path, env: Variables, tools: Path, proxy: _Server, installer: str) -> None:
    """The list of packages is short, so that the test is quick."""
    home = clone(tmp_path, env)
    env["PATH"] = f"{tool('uv', tools, env).parent}{os.pathsep}{env['PATH']}"
    env |= {"HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_port}", "INSTALLER": installer}
    env |= {"UV_CACHE_DIR": str(tmp_path / "uv"), "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "", "no_proxy": ""}
    shorten(home)
    run("sh", "tools/install.sh", cwd=home, env=env)
    assert "files.pythonhosted.org" in proxy.hosts or env.get("PIP_INDEX_URL")
    assert proxy.hosts


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize("variable", ["PIP_INDEX_URL", "UV_INDEX_URL"])
def test_make_takes_everything_from_a_local_index(
    tmp_path: Path, env: Variables, tools: Path, installer: str, variable: str
) -> None:
    """Whichever program installs, it uses the index that either variable names, and nothing else."""
    home = clone(tmp_path, env)
    env["PATH"] = f"{tool('uv', tools, env).parent}{os.pathsep}{env['PATH']}"
    shorten(home)
    index = tmp_path / "index"
    needed = ("hatchling", "editables", "pip", "setuptools", "wheel")
    run(sys.executable, "-m", "pip", "download", "--quiet", "-d", index, *needed, env=env)
    for file in list(index.iterdir()):
        name = file.name.split("-")[0].replace("_", "-").lower()
        (index / name).mkdir(exist_ok=True)
        file.rename(index / name / file.name)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: http.server.SimpleHTTPRequestHandler(*given, directory=str(index))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "PIP_FIND_LINKS", "UV_FIND_LINKS"):
        env.pop(name, None)
    # Everything that is not the local index is out of reach.
    env |= {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "INSTALLER": installer,
        "PIP_CONFIG_FILE": os.devnull,
        "UV_NO_CONFIG": "1",
    }
    env |= {
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "PIP_NO_CACHE_DIR": "1",
        variable: f"http://127.0.0.1:{server.server_port}",
    }
    try:
        said = run("sh", "tools/install.sh", cwd=home, env=env)
    finally:
        server.shutdown()
    assert env[variable] in said
    assert CPU_INDEX not in said


def shorten(home: Path) -> None:
    """Replace the dependencies by one small package: these tests are about where packages come from."""
    for file, name in ((home / "pyproject.toml", "safelight"), (home / "starter/pyproject.toml", "safelight-starter")):
        text = file.read_text()
        head, _, rest = text.partition("dependencies = [")
        if rest and name == "safelight":
            text = (
                head
                + 'dependencies = []\n[project.optional-dependencies]\nall = []\ndev = ["packaging"]\n[project.scripts]'
                + (rest.partition("[project.scripts]")[2])
            )
        file.write_text(text)
    (home / "constraints.txt").write_text("torch==0\n")
    script = home / "tools/install.sh"
    text = script.read_text().replace("""torch=$(grep '^torch==' constraints.txt)""", "torch=packaging")
    script.write_text(text)


def base_image(buildah: Sequence[str], folder: Path, env: Variables) -> str:
    """The base that the Containerfile names, or where no registry can be reached, one that debootstrap makes."""
    named = "docker.io/library/python:3.12-slim-bookworm"
    if not subprocess.run([*buildah, "pull", "-q", named], env=env, capture_output=True, check=False).returncode:
        return named
    if not shutil.which("debootstrap") or os.geteuid():
        pytest.skip("the base image cannot be pulled, and debootstrap (as root) cannot make one")
    run(
        "debootstrap",
        "--variant=minbase",
        "--include=python3,python3-venv,ca-certificates",
        "bookworm",
        folder,
        env=env,
    )
    container = run(*buildah, "from", "scratch", env=env).strip()
    run(*buildah, "add", "-q", container, folder, "/", env=env)
    run(*buildah, "commit", "-q", container, "safelight-base", env=env)
    run(*buildah, "rm", container, env=env)
    return "localhost/safelight-base"


def test_a_container(tmp_path: Path, env: Variables) -> None:
    if not shutil.which("buildah"):
        pytest.skip("buildah is missing")
    store = ("--root", str(tmp_path / "store"), "--runroot", str(tmp_path / "run"), "--storage-driver", "vfs")
    buildah = ("buildah", *store)
    base = base_image(buildah, tmp_path / "base", env)
    given = [
        f"--build-arg={name}={env[name]}" for name in ("PIP_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT") if name in env
    ]
    folders = {str(Path(env[name])) for name in ("PIP_FIND_LINKS",) if Path(env.get(name, "-")).is_dir()}
    folders |= {str(Path(env["PIP_CERT"]).parent)} if "PIP_CERT" in env else set()
    volumes = [f"--volume={folder}:{folder}:ro" for folder in sorted(folders)]
    build = (
        *buildah,
        "build",
        "--isolation=chroot",
        "--format=docker",
        "-f",
        "deploy/Containerfile",
        f"--build-arg=BASE={base}",
    )
    run(*build, *given, *volumes, "-t", "safelight", ".", cwd=clone(tmp_path, env), env=env)
    container = run(*buildah, "from", "safelight", env=env).strip()
    inside = (*buildah, "run", "--isolation=chroot")
    assert run(*inside, container, "--", "id", "-un", env=env).strip() == "safelight"
    assert run(*inside, container, "--", "safelight", "--version", env=env).strip() == f"safelight {VERSION}"
    run(*inside, container, "--", "safelight", "generate", "red apple", "-m", "starter-noto", "--steps", "1", env=env)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # chroot isolation has the host's network, where 9090 may be taken.
    command = [
        *inside,
        "--env=SAFELIGHT_API_KEY=for-this-test",
        container,
        "--",
        "safelight",
        "serve",
        "--host",
        "0.0.0.0",
    ]
    server = subprocess.Popen([*command, "--port", str(port)], env=env)
    try:
        wait_for_health(port)
    finally:
        server.terminate()
        server.wait(60)
        run(*buildah, "rm", container, env=env)


def wait_for_health(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
            connection.request("GET", "/api/v1/health")
            assert connection.getresponse().status == 200
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.5)
        else:
            return
