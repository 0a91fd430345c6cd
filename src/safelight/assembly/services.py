"""Wires the parts of a server below HTTP: the library, the queue, the worker's supervisor. No torch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from safelight import extras
from safelight.assembly.command_run import CommandRun
from safelight.assembly.isolated import open_isolated_runner
from safelight.assembly.library import open_library
from safelight.assembly.programs import WORKER, ZYGOTE
from safelight.assembly.slots import SlotPlan, plan_slots
from safelight.catalog.adapters import Adapters
from safelight.catalog.catalog import Catalog
from safelight.catalog.inputs import Inputs
from safelight.catalog.library import Library
from safelight.catalog.watching import Changes, FolderWatcher
from safelight.downloads.manager import Download, Downloads
from safelight.errors import InputError, SafelightError, StorageError, UnreadableFileError
from safelight.logs import Log
from safelight.queue.database import Database
from safelight.queue.events import Event, Events
from safelight.queue.image_files import Gallery
from safelight.queue.image_store import ImageStore
from safelight.queue.order import OvertakeLimits
from safelight.queue.shares import Shares
from safelight.queue.timings import Timings, known
from safelight.request.job import Job
from safelight.request.schema import Request
from safelight.resolve.contents import find_model
from safelight.resolve.resolve import resolve
from safelight.settings import Settings
from safelight.settings_sources import LoadedSettings, explain_settings
from safelight.workers.choosing import Choosing
from safelight.workers.dispatcher import Dispatcher
from safelight.workers.fresh_process import FreshProcesses
from safelight.workers.isolation import IsolatedRunner
from safelight.workers.job_runner import JobRunner
from safelight.workers.slot import Slot
from safelight.workers.slot_supervisor import SlotSupervisor
from safelight.workers.supervisor import Supervisor

if TYPE_CHECKING:
    from safelight.cluster.cluster import Cluster

_log = Log(__name__)

MakeSlot = Callable[[str, SlotSupervisor, IsolatedRunner], Slot]
"""Makes a slot of a name, with what runs its jobs, and its isolated jobs."""

SWEEP_SECONDS = 86_400
"""Seconds between two sweeps of the trash and of the unused input images."""


@dataclass(frozen=True)
class Services:
    """The parts of a server below HTTP.

    ``sources``: where each setting came from when the server started.
    ``stored_at_start``: the settings without the options of the command, at that time, as JSON has them.
    ``lock``: the running server holds it, so that a root has only one server.
    """

    settings: Settings
    sources: LoadedSettings
    stored_at_start: Mapping[str, Any]
    library: Library
    catalog: Catalog
    database: Database
    gallery: Gallery
    images: ImageStore
    events: Events
    dispatcher: Dispatcher
    fresh_processes: FreshProcesses
    downloads: Downloads
    watcher: FolderWatcher
    doctor: CommandRun
    compacting: CommandRun
    timings: Timings
    lock: FileLock
    stopping: threading.Event
    cluster: Cluster | None = None

    def start(self) -> None:
        """Start the queue. Once a day, empty the trash of what was there long enough, and trash unused input images."""
        self.dispatcher.start()
        self.downloads.start()
        self.watcher.start()
        threading.Thread(target=self._sweep, name="safelight-sweep", daemon=True).start()

    def _sweep(self) -> None:
        while True:
            try:
                moved, removed = self.catalog.inputs.sweep(self.database.inputs(), self.settings.trash_days)
                _log.info("input images", into_the_trash=moved, removed=removed)
                _log.info("images", removed=self.images.empty_trash(self.settings.trash_days))
            except (SafelightError, OSError) as error:
                _log.warning("the trash was not swept", why=str(error))
            if self.stopping.wait(SWEEP_SECONDS):
                return

    def stop(self) -> None:
        """Finish the running job or put it back into the queue, end the processes, and unlock the root."""
        self.stopping.set()
        self.watcher.stop()
        self.downloads.stop()
        self.doctor.stop()
        self.compacting.stop()
        self.fresh_processes.close()
        self.dispatcher.stop(self.settings.shutdown_seconds)
        for slot in self.dispatcher.slots:
            slot.runner.close()
        if self.cluster is not None:
            self.cluster.leave()
        self.database.close()
        self.lock.release()


def open_services(settings: Settings, sources: LoadedSettings | None = None, cluster: str = "") -> Services:
    """Open everything that a server needs below HTTP. The worker starts to import.

    ``cluster``: the address of a Ray cluster whose slots are used in place of this machine's devices; "" for none.
    ``sources``: where the settings came from; None if no file and no variable was read.

    Raises InputError when another server uses this root, UnreadableFileError when the root cannot be written, and the
    errors of opening the database.
    """
    library = open_library(settings)
    # Lock before opening the database: opening migrates it, which must not happen while another server uses it.
    lock = _lock_root(settings.root)
    with contextlib.ExitStack() as undo:
        undo.callback(lock.release)
        database = Database(settings.root, url=settings.plain_database_url)
        undo.callback(database.close)
        database.claim()
        catalog = Catalog(library, Adapters(settings.root), Inputs(settings.root))
        joined = None if not cluster else join_cluster(cluster, settings, catalog)
        undo.pop_all()
    gallery, events = Gallery(settings.root, settings.image_names), Events()
    images = ImageStore(database, gallery, events)
    timings, stopping = Timings(settings.root / "timings.json"), threading.Event()
    dispatcher = _open_dispatcher(settings, catalog, database, images, events, timings, stopping, joined)
    fresh_processes = FreshProcesses(WORKER, settings, catalog)
    return Services(
        settings,
        sources or LoadedSettings(settings, dict.fromkeys(type(settings).model_fields, "default"), {}),
        explain_settings(settings.root, sources.file if sources else None).settings.model_dump(mode="json"),
        library,
        catalog,
        database,
        gallery,
        images,
        events,
        dispatcher,
        fresh_processes,
        _open_downloads(settings, library, events),
        _open_watcher(settings, catalog, events),
        CommandRun(settings.root, lambda: events.tell(Event("doctor", "", role="admin"))),
        CommandRun(settings.root, lambda: _tell_compacting(events)),
        timings,
        lock,
        stopping,
        joined,
    )


def _open_dispatcher(
    settings: Settings,
    catalog: Catalog,
    database: Database,
    images: ImageStore,
    events: Events,
    timings: Timings,
    stopping: threading.Event,
    cluster: Cluster | None,
) -> Dispatcher:
    library = catalog.library

    def resolve_again(request: Request, digest: str) -> Job:
        return resolve(request, catalog, by_path=False, model=find_model(request.model, digest, library))

    def switch_seconds() -> dict[str, float]:
        models = [known(card) for card in library.cards()]
        seconds = zip(models, timings.switch_seconds(models), strict=True)
        return {model.digest: each for model, each in seconds if each is not None}

    limits = OvertakeLimits(settings.queue_overtakes, settings.queue_delay_seconds, settings.queue_lead_seconds)

    weights: dict[str, float] = {}

    def weight(name: str) -> float:
        # It is asked for a job that has started already. That must not fail because the database does not answer.
        with contextlib.suppress(StorageError):
            person = database.people.get(name) if name else None
            weights[name] = 1.0 if person is None else person.weight
        return weights.get(name, 1.0)

    choosing = Choosing(database, limits, switch_seconds, Shares(weight))

    def make_slot(name: str, supervisor: SlotSupervisor, isolated: IsolatedRunner) -> Slot:
        runner = JobRunner(
            *(name, database, images, supervisor, isolated, events, resolve_again),
            *(partial(choosing.upcoming, name), timings, stopping),
        )
        return Slot(name, supervisor, runner)

    def open_slot(plan: SlotPlan) -> Slot:
        supervisor = Supervisor(WORKER, plan.settings, settings.spare_worker, plan.environment)
        return make_slot(plan.name, supervisor, open_isolated_runner(plan.settings))

    plans = [] if cluster is not None else plan_slots(settings)
    dispatcher = Dispatcher(
        database,
        images,
        [open_slot(plan) for plan in plans],
        choosing,
        events,
        settings.max_queue_size,
        settings.idle_unload_seconds,
        settings.stall_seconds,
        stopping,
    )
    if cluster is not None:
        _use_cluster(cluster, dispatcher, make_slot)
    return dispatcher


def _use_cluster(cluster: Cluster, dispatcher: Dispatcher, make_slot: MakeSlot) -> None:
    """Use all slots of a cluster, also the slots that join it later."""

    def add_slot() -> None:
        supervisor = cluster.open_supervisor(dispatcher.wake)
        # The machine makes isolated images, too.
        dispatcher.add(make_slot(f"cluster:{len(dispatcher.slots)}", supervisor, supervisor))

    # Without a machine, one slot waits for the first.
    offered = max(1, cluster.offered())
    for _ in range(offered):
        add_slot()
    cluster.watch(offered, add_slot)


def join_cluster(address: str, settings: Settings, catalog: Catalog) -> Cluster:
    """Join a Ray cluster. Raises InputError if there is none, MissingExtraError without the extra ``cluster``."""
    extras.require("cluster", "--cluster")
    # Ray takes a second to import, and only a cluster needs it.
    from safelight.cluster.cluster import Cluster

    return Cluster(address, settings, catalog, WORKER, ZYGOTE)


def _lock_root(root: Path) -> FileLock:
    """Return the lock of a root, held by this process. Raises InputError if another server holds it."""
    lock = FileLock(root / ".serving")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"another Safelight server uses {root}; stop it, or choose another folder with --root"
        ) from error
    except OSError as error:
        raise UnreadableFileError(root, f"cannot be written: {error.strerror or error}") from error
    return lock


def _open_downloads(settings: Settings, library: Library, events: Events) -> Downloads:
    def tell(download: Download) -> None:
        events.tell(Event("download", "", asdict(download), role="member"))

    folder = settings.download_folder or settings.root / "downloads"
    return Downloads(settings.root, folder, library, settings.download_hosts, tell)


def _tell_compacting(events: Events) -> None:
    # When it ends, the library has a new model.
    events.tell(Event("compacting", "", role="admin"))
    events.tell(Event("models", ""))


def _open_watcher(settings: Settings, catalog: Catalog, events: Events) -> FolderWatcher:
    def tell(changes: Changes) -> None:
        events.tell(Event("models", "", asdict(changes)))

    return FolderWatcher(settings.watched_folders, catalog, tell)
