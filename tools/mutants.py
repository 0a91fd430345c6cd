"""Protections are removed one at a time, and the tests that stand for each must then go red.

``make mutants`` runs all, ``python tools/mutants.py NAME …`` some. Each is a change of one place in a copy of the
source; only the tests that are named run. A mutant that survives means that nobody would notice if the protection went.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[1]
SECONDS = 300
"""A test that hangs without its protection is red too."""


@dataclass(frozen=True)
class Mutant:
    """In ``file`` (below ``src/safelight``) ``old`` becomes ``new``; then ``tests`` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant(
        "a lease leaves room for what it dequantises",
        "memory/planner.py",
        "            later += lease.use.dequantised_bytes\n",
        "            later += 0\n",
        "tests/memory/test_dequantiser.py::test_a_lease_leaves_room_for_what_it_dequantises",
    ),
    Mutant(
        "what a lease dequantises is taken with its plan",
        "memory/residency.py",
        "        lease.dequantiser.reserve(lease.use.dequantised_bytes)\n",
        "",
        "tests/memory/test_dequantiser.py::test_a_lease_leaves_room_for_what_it_dequantises",
    ),
    Mutant(
        "an operation may dequantise more than its plan expects",
        "memory/dequantiser.py",
        "REASON, over_budget=True)",
        "REASON)",
        "tests/memory/test_dequantiser.py::test_an_operation_that_dequantises_more_than_the_plan_expects_goes_on",
    ),
    Mutant(
        "freed blocks return to the system while the heap is small",
        "devices/machine.py",
        "    _set_thresholds(1 << 20)\n",
        "    _set_thresholds(32 << 20)\n",
        "tests/devices/test_machine.py::test_freed_blocks_return_to_the_system_while_the_heap_is_kept_small",
    ),
    Mutant(
        "a packed record follows its model",
        "cluster/needed.py",
        "known is not None and known[0] is owner",
        "known is not None",
        "tests/cluster/test_node_files.py::test_a_record_is_packed_once_until_it_changes",
    ),
    Mutant(
        "only paths with a route are remembered",
        "server/gate.py",
        "        if unknown is None:\n            if len",
        "        if True:\n            if len",
        "tests/server/test_native.py::test_what_is_no_path_is_said_in_json",
    ),
    Mutant(
        "a lost connection of this server gives its claim back",
        "queue/database_server.py",
        "ended = self._backend is not None and connection.execute(text(END_OWN), self._backend).scalar()",
        "ended = False",
        "tests/queue/test_postgres.py::test_a_claim_whose_connection_is_lost_on_one_side_is_taken_again",
    ),
    Mutant(
        "the claim is checked after the wait for others who write",
        "queue/sql_database.py",
        "        connection.execute(self._begin)\n",
        "        self.before_writing()\n        connection.execute(self._begin)\n        return\n",
        "tests/queue/test_postgres.py::test_a_write_that_waits_while_another_server_claims_the_database_is_refused",
    ),
    Mutant(
        "a closed database claims nothing",
        "queue/database_server.py",
        "            self._closed = True\n",
        "",
        "tests/queue/test_postgres.py::test_a_closed_database_claims_nothing",
    ),
    Mutant(
        "a database in use is not migrated",
        "queue/database_server.py",
        "migrate and bool(free)",
        "migrate",
        "tests/queue/test_postgres.py::test_a_database_that_a_server_uses_is_not_migrated",
    ),
    Mutant(
        "own processes import no modules for several machines",
        "assembly/lean_imports.py",
        "    torch.distributed.is_available = lambda: False\n",
        "",
        "tests/assembly/test_lean_imports.py::test_what_is_postponed_works_when_it_is_used",
    ),
    Mutant(
        "no later job before a due one, whatever slot asks",
        "queue/order.py",
        "            free = [job for job in free if job.number < first_due.number]\n",
        "            pass\n",
        "tests/queue/test_order.py::test_the_bounds_hold_when_workers_die_and_jobs_are_tried_again",
    ),
    Mutant(
        "free slots that leave a job to another ask again when a job ends",
        "queue/order.py",
        "            now = min(ends)\n",
        "            return\n",
        "tests/queue/test_order.py::test_what_is_said_beforehand_takes_few_choices_with_any_slots",
    ),
    Mutant(
        "an image of one latent spoils nothing for later ones",
        "pipeline/checks/appearance.py",
        "every.std(0, correction=0)",
        "every.std(0)",
        "tests/pipeline/checks/test_appearance.py::test_an_image_of_one_latent_spoils_nothing_for_later_ones",
    ),
    Mutant(
        "a thumbnail that was lost with the power is made again",
        "queue/image_files.py",
        " or not path.stat().st_size",
        "",
        "tests/queue/test_image_files.py::test_a_thumbnail_that_was_lost_with_the_power_is_made_again",
    ),
    Mutant(
        "a thumbnail for which there is no room leaves no marker",
        "queue/image_files.py",
        "                    self.finish(image_id)\n                    raise\n",
        "                    raise\n",
        "tests/queue/test_image_files.py::test_a_thumbnail_for_which_there_is_no_room_leaves_nothing",
    ),
    Mutant(
        "a timing that was not written is written later",
        "queue/timings.py",
        "not _differ(in_file, timing)",
        "not (before and _differ(before, timing))",
        "tests/queue/test_timings.py::test_the_file_is_not_written_for_each_image",
    ),
    Mutant(
        "a document that changed is parsed again",
        "queue/documents.py",
        "if cached is not None and cached[0] == document:",
        "if cached is not None:",
        "tests/queue/test_documents.py",
    ),
    Mutant(
        "the queue is looked at again when it changed",
        "workers/choosing.py",
        "        self._version = version\n",
        "",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "claim of a server on PostgreSQL's database after a restart",
        "queue/database.py",
        "            self._file.before_writing = self._claim.check\n",
        "",
        "tests/queue/test_postgres.py::test_after_a_restart_of_postgresql_only_one_server_writes",
    ),
    Mutant(
        "which rows are stored past the cache",
        "weights/compiled_decoding.py",
        "aligned = not (numbers.ctypes.data % ALIGNMENT or numbers.strides[0] % ALIGNMENT)",
        "aligned = not numbers.ctypes.data % ALIGNMENT",
        "tests/weights/test_compiled_decoding.py::test_nothing_else_is_written_wherever_the_numbers_begin",
    ),
    Mutant(
        "digest of what is read",
        "devices/transfer.py",
        "    if digest != read.xxh3:\n",
        "    if False:\n",
        "tests/devices/test_transfer.py::test_one_flipped_bit_is_an_error",
    ),
    Mutant(
        "a file that ends early",
        "devices/transfer.py",
        'raise IntegrityError(read.path, read.name, "the file ends before the tensor does", _CHANGED_REMEDY)',
        "return",
        "tests/devices/test_transfer.py::test_load_06_a_short_file_is_an_error_never_zeros",
    ),
    Mutant(
        "sum where a copy arrived",
        "devices/transfer.py",
        "            return sums.compute_sum(target) == sent\n",
        "            return True\n",
        "tests/devices/test_simulated.py::test_copy_rows_are_repaired",
    ),
    Mutant(
        "fence of a copy",
        "devices/transfer.py",
        "            for fence in fences:\n                fence.wait()\n        except BaseException:",
        "        except BaseException:",
        "tests/devices/test_simulated.py tests/contracts/test_device.py",
    ),
    Mutant(
        "mark before a copy",
        "devices/transfer.py",
        "                target.fill_(FILL_BYTE)\n",
        "                pass\n",
        "tests/devices/test_simulated.py",
    ),
    Mutant(
        "absent parameters raise",
        "models/absent.py",
        "        raise AbsentTensorError(_first_label([*args, *(kwargs or {}).values()]), "
        'getattr(func, "__name__", str(func)))',
        "        with torch._C.DisableTorchFunctionSubclass():\n            return func(*args, **(kwargs or {}))",
        "tests/models/test_absent.py",
    ),
    Mutant(
        "strict names and shapes at binding",
        "models/bind.py",
        "        if ours != theirs:\n",
        "        if False:\n",
        "tests/models/test_bind.py::test_weights_that_do_not_fit_are_refused",
    ),
    Mutant(
        "alignment of weights",
        "models/bind.py",
        "        if self._lease.address(tensor) % ALIGNMENT:\n",
        "        if False:\n",
        "tests/test_switching.py::test_attention_09_broken_alignment_is_seen",
    ),
    Mutant(
        "parameters are emptied at the end",
        "models/bind.py",
        "                parameter.data = nothing[dtypes[name]]\n",
        "                pass\n",
        "tests/models/test_bind.py::test_nothing_survives_whatever_is_kept",
    ),
    Mutant(
        "bound weights that were written",
        "models/bind.py",
        "                    self._lease.mark_corrupted(name)\n",
        "                    pass\n",
        "tests/models/test_bind.py::test_state_01_weights_that_were_written_are_read_again",
    ),
    Mutant(
        "an adapter over a weight that stays quantised is computed at its use",
        "memory/lease.py",
        "            self.fetcher.apply_overlay(name, wide)\n",
        "            pass\n",
        "tests/families/test_compact_files.py::test_quant_01_and_02_adapters_over_quantised_weights",
    ),
    Mutant(
        "an adapter is computed where its weight arrives",
        "memory/host_source.py",
        "                for name in touched:\n                    self.apply_overlay",
        "                for name in ():\n                    self.apply_overlay",
        "tests/memory/test_behind.py::test_the_device_computes_overlays_and_the_host_has_no_result",
    ),
    Mutant(
        "what was in a slab before changes no sum",
        "memory/source.py",
        "        base[at : self.segment.nbytes].zero_()\n",
        "",
        "tests/memory/test_behind.py::test_what_was_in_a_slab_before_changes_no_sum",
    ),
    Mutant(
        "the first copy with an overlay is verified",
        "memory/host_source.py",
        'verify |= always_verify and transfers.verification.policy != "off"',
        "pass",
        "tests/memory/test_behind.py::test_the_first_copy_with_an_overlay_is_verified",
    ),
    Mutant(
        "an overlay on a device comes out as before",
        "memory/host_source.py",
        "        if known is not None and result != known:\n",
        "        if False:\n",
        "tests/memory/test_behind.py::test_an_overlay_that_comes_out_otherwise_on_the_device_is_an_error",
    ),
    Mutant(
        "a model's defaults are for what a request leaves out",
        "request/model_defaults.py",
        'if getattr(request, name) in (None, "")',
        "if True",
        "tests/request/test_model_defaults.py",
    ),
    Mutant(
        "a file that is being written waits",
        "catalog/watching.py",
        "return time.time() - stamp[1] / 1e9 > SETTLED_SECONDS",
        "return True",
        "tests/catalog/test_watching.py::test_a_file_that_is_being_written_waits",
    ),
    Mutant(
        "what the library has is known by its content",
        "downloads/wanted.py",
        "            if found is not None and found.sha256 == file.sha256:\n",
        "            if False:\n",
        "tests/cli/test_catalogue.py",
    ),
    Mutant(
        "fingerprint after a job",
        "models/skeleton.py",
        "        changed = skeleton.differences()\n        if changed:\n"
        "            self._log_discard(skeleton, changed)\n            return changed\n",
        "",
        "tests/models/test_bind.py tests/pipeline/test_repair.py",
    ),
    Mutant(
        "fingerprint before a job",
        "models/skeleton.py",
        "if cached is not None and (changed := cached.differences()):",
        "if cached is not None and (changed := []):",
        "tests/pipeline/test_repair.py",
    ),
    Mutant(
        "attention is part of a skeleton's key",
        "models/skeleton.py",
        "    attention: str\n    device: torch.device = CPU\n",
        "    attention: str = field(compare=False)\n    device: torch.device = CPU\n",
        "tests/models/test_attention.py::test_a_model_and_a_base_can_have_their_own tests/pipeline/test_repair.py",
    ),
    Mutant(
        "attention is set by object",
        "boundary/kernels.py",
        "            child.set_processor(_processor(name, slice_size, child.heads))\n",
        "            pass\n",
        "tests/boundary/test_modules.py tests/models/test_attention.py",
    ),
    Mutant(
        "auto does not use a kernel that computes wrongly",
        "models/attention.py",
        "            if self.test([name], dtype)[name].passed:\n",
        "            if self.test([name], dtype)[name]:\n",
        "tests/models/test_attention.py",
    ),
    Mutant(
        "kernels are tried",
        "models/attention.py",
        "            if not result.passed:\n",
        "            if False:\n",
        "tests/models/test_attention.py",
    ),
    Mutant(
        "kernels are tried on strided inputs",
        "models/attention.py",
        "    if shape.strided:\n",
        "    if False:\n",
        "tests/models/test_attention.py",
    ),
    Mutant(
        "kernels are tried in poisoned memory",
        "models/attention.py",
        "    torch.use_deterministic_algorithms(True, warn_only=True)\n",
        "    pass\n",
        "tests/models/test_attention.py",
    ),
    Mutant(
        "the gate of a step",
        "pipeline/checks/latents.py",
        "    if not math.isfinite(found):\n",
        "    if False:\n",
        "tests/pipeline/checks tests/pipeline/test_repair.py tests/pipeline/test_run.py",
    ),
    Mutant(
        "repair proves what is in memory",
        "pipeline/repair.py",
        "        if corrupted := self.check(model):\n            yield",
        "        if corrupted := []:\n            yield",
        "tests/pipeline/test_repair.py",
    ),
    Mutant(
        "repair reads anew",
        "pipeline/repair.py",
        '        self._drop(model)\n        yield _Try("loading"',
        '        yield _Try("loading"',
        "tests/pipeline/test_repair.py",
    ),
    Mutant(
        "repair copies synchronously",
        "pipeline/repair.py",
        "            resources.device.asynchronous = False\n",
        "",
        "tests/pipeline/test_repair.py",
    ),
    Mutant(
        "quarantine",
        "catalog/quarantine.py",
        "        if reason is not None:\n            remedy",
        "        if False:\n            remedy",
        "tests/pipeline/test_repair.py",
    ),
    Mutant(
        "weights in memory are verified again",
        "memory/lease.py",
        "        if expected is not None and source.compute_checksums(self.buffer) != expected:\n"
        "            return False\n",
        "        if False:\n            return False\n",
        "tests/pipeline/test_memory.py tests/memory/test_residency.py",
    ),
    Mutant(
        "a lease holds",
        "memory/segment_table.py",
        "            resident.lease_count += 1\n            lease.residents",
        "            lease.residents",
        "tests/memory/test_residency.py",
    ),
    Mutant(
        "the budget is a bound",
        "memory/budget.py",
        "            if nbytes > free and not already_used:\n",
        "            if False:\n",
        "tests/memory/test_budget.py tests/memory/test_residency.py",
    ),
    Mutant(
        "a slab that somebody holds is not used again",
        "devices/pool.py",
        "            if slab.holders() > 0:\n                self._recorder.rename",
        "            if False:\n                self._recorder.rename",
        "tests/devices/test_transfer.py tests/contracts/test_device.py",
    ),
    Mutant(
        "a convolution's result has the usual order",
        "boundary/convolutions.py",
        "return found if found.is_contiguous() else _with_channels_first(found)",
        "return found",
        "tests/boundary/test_convolutions.py",
    ),
    Mutant(
        "only large results of convolutions are copied by rows",
        "boundary/convolutions.py",
        "return large and native_on_cpu(picture.dtype)",
        "return native_on_cpu(picture.dtype)",
        "tests/boundary/test_convolutions.py",
    ),
    Mutant(
        "large tensors have huge pages",
        "assembly/__init__.py",
        'os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")',
        "",
        "tests/assembly/test_huge_pages.py",
    ),
    Mutant(
        "input images count to what a person has on disk",
        "server/intake.py",
        "return control.database.images.bytes_of(person) + inputs",
        "return control.database.images.bytes_of(person)",
        "tests/server/test_people.py::test_input_images_count_to_what_a_guest_has_on_disk",
    ),
    Mutant(
        "a ring's slot that is in use stays",
        "memory/ring.py",
        "idle = [slot for slot in self._slots if slot.users == 0]",
        "idle = list(self._slots)",
        "tests/memory/test_ring.py",
    ),
    Mutant(
        "all bytes are in a component's digest",
        "weights/manifest.py",
        "    if whole_digest(components) != manifest.digest:\n",
        "    if False:\n",
        "tests/weights/test_manifest.py",
    ),
    Mutant(
        "a file's hint is looked at",
        "catalog/library.py",
        "        changed = model.manifest.changed_files()\n        if not changed:\n            return model\n",
        "        changed = []\n        if not changed:\n            return model\n",
        "tests/catalog/test_library.py",
    ),
    Mutant(
        "content is compared with the manifest",
        "catalog/describe.py",
        "    if current.digest == model.manifest.digest:\n        return\n",
        "    return\n",
        "tests/catalog/test_library.py",
    ),
    Mutant(
        "a job is pinned to its content",
        "workers/local_engine.py",
        "        if found is None:\n            path = self.library.find(reference.name).path\n",
        "        if found is None:\n            return self.library.find(reference.name)\n",
        "tests/workers/test_supervisor.py::test_other_content_than_was_accepted_is_refused",
    ),
    Mutant(
        "random state belongs to the job",
        "pipeline/numerics/modes.py",
        "        torch.default_generator.manual_seed(seed)\n",
        "        pass\n",
        "tests/pipeline/test_numerics.py",
    ),
    Mutant(
        "threads belong to the job",
        "pipeline/numerics/table.py",
        '        NumericSetting("threads", torch.get_num_threads, torch.set_num_threads, threads, required=True),\n',
        "",
        "tests/test_switching.py tests/pipeline/test_run.py",
    ),
    Mutant(
        "a cancel is known before the worker is told",
        "workers/job_runner.py",
        "        self.cancelled.add(job_id)\n",
        "        pass\n",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "each job ends once",
        "queue/statements.py",
        '    _job.state.in_(bindparam("was", expanding=True)),\n',
        "",
        "tests/queue/test_database.py",
    ),
    Mutant(
        "an end that could not be written is written before the next job",
        "workers/dispatcher.py",
        "        self._write(slot)\n        if slot.restarts_when_free",
        "        if slot.restarts_when_free",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "a cancel between two tries",
        "workers/dispatcher.py",
        "            if job.id in slot.runner.cancelled:\n                # Somebody",
        "            if False:\n                # Somebody",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "a cancel while the worker starts",
        "workers/supervisor.py",
        "                while not cancelled():\n",
        "                while True:\n",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "several jobs or none",
        "queue/database.py",
        "            if max_queued is not None and waiting + len(jobs) > max_queued:\n",
        "            if max_queued is not None and waiting >= max_queued:\n",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "a full memory rejects no kernel",
        "models/attention.py",
        "        if is_lost(error) or is_out_of_memory(error):\n",
        "        if is_lost(error):\n",
        "tests/models/test_attention.py",
    ),
    Mutant(
        "a request is divided only among slots that compute alike",
        "server/intake.py",
        " if all(way == ways[0] for way in ways) else 1\n",
        "\n",
        "tests/server/test_slots.py",
    ),
    Mutant(
        "a person has no more waiting jobs than allowed",
        "queue/database.py",
        "            if max_own is not None and own + len(jobs) > max_own:\n",
        "            if False:\n",
        "tests/server/test_people.py",
    ),
    Mutant(
        "the pictures of a refused request count",
        "server/intake.py",
        "            control.database.input_owners.add(who.name, [digests[key]])\n",
        "",
        "tests/server/test_people.py",
    ),
    Mutant(
        "a row that was not confirmed keeps its file",
        "queue/image_store.py",
        "            if self._database.images.get_all([image.id]):\n",
        "            if False:\n",
        "tests/queue/test_image_store.py",
    ),
    Mutant(
        "a second deletion removes no file",
        "queue/image_store.py",
        "            if image.id in deleted:\n                self._gallery",
        "            if image.id:\n                self._gallery",
        "tests/queue/test_image_store.py",
    ),
    Mutant(
        "OpenAI's client does not repeat a job that was cancelled",
        "server/problems.py",
        '            headers = {"x-should-retry": "false"} if error.final else None\n',
        "            headers = None\n",
        "tests/clients/test_openai.py",
    ),
    Mutant(
        "the process that forks computes no adapter",
        "pipeline/components.py",
        "        if isinstance(component, OverlaidComponent):\n",
        "        if False:\n",
        "tests/workers/test_isolation.py",
    ),
    Mutant(
        "wrong weights of a pinned model are read again",
        "workers/local_engine.py",
        "                    with self.loaded.without_pin(model.name):\n",
        "                    with contextlib.nullcontext():\n",
        "tests/pipeline/test_memory.py",
    ),
    Mutant(
        "a sum that may be wrong is forgotten",
        "memory/source.py",
        "            del self.checksums[key]\n",
        "",
        "tests/models/test_streamed.py",
    ),
    Mutant(
        "a keeper that dies ends the zygote",
        "assembly/zygote.py",
        "        if status:\n            _end_like(status)\n        return pickle",
        "        if status:\n            self._pipe.say(Ended('', 'failed', '', ()))\n        return pickle",
        "tests/workers/test_isolation.py",
    ),
    Mutant(
        "a variant of files is a plain name",
        "downloads/huggingface.py",
        "    if not _VARIANT_NAME.fullmatch(wanted.variant):\n",
        "    if False:\n",
        "tests/downloads/test_downloads.py",
    ),
    Mutant(
        "a download stays within its folder",
        "downloads/download.py",
        "checked_name(bundle.title, bundle.folder)",
        "bundle.folder",
        "tests/downloads/test_downloads.py",
    ),
    Mutant(
        "long arrays of a GGUF header are not kept",
        "files/gguf.py",
        "None if count > MOST_NUMBERS else",
        "None if False else",
        "tests/files/test_gguf.py",
    ),
    Mutant(
        "images that are made during a backup have their files",
        "assembly/backup.py",
        "                        if name not in manifest:\n",
        "                        if False:\n",
        "tests/assembly/test_backup.py",
    ),
    Mutant(
        "a preset has a limit",
        "server/apis/native_presets.py",
        "        if (characters := len(json.dumps(asked.fields))) > MOST_CHARACTERS:\n",
        "        if (characters := 0):\n",
        "tests/server/test_native_options.py",
    ),
    Mutant(
        "enlarged pictures have a limit together",
        "server/apis/a1111_extras.py",
        "            left -= pixels\n",
        "",
        "tests/clients/test_webuiapi.py",
    ),
    Mutant(
        "an interrupt waits for the end of an import",
        "cli/interrupts.py",
        "    if _imports(frame):\n",
        "    if False:\n",
        "tests/cli/test_interrupts.py",
    ),
    Mutant(
        "a request is divided only if its parts may wait",
        "server/intake.py",
        "        with contextlib.suppress(QueueFullError):\n            return queue(parts)\n",
        "        return queue(parts)\n",
        "tests/server/test_slots.py",
    ),
    Mutant(
        "the parts of a request have their own seeds",
        "request/schema.py",
        "        return replace(self, count=count, seed=self.seed + first)\n",
        "        return replace(self, count=count, seed=self.seed)\n",
        "tests/request/test_schema.py",
    ),
    Mutant(
        "what the start has handled is not handled again",
        "queue/image_files.py",
        "        self._unfinished.keep(stay)\n",
        "",
        "tests/queue/test_image_files.py",
    ),
    Mutant(
        "unfinished images of an earlier version",
        "queue/image_files.py",
        "{**self._markers(), **self._unfinished.read()}",
        "self._unfinished.read()",
        "tests/queue/test_image_files.py",
    ),
    Mutant(
        "the list of unfinished images is emptied only if all are finished",
        "queue/unfinished.py",
        "                if self._open:\n",
        "                if False:\n",
        "tests/queue/test_image_files.py",
    ),
    Mutant(
        "the name of a finished image may be another's",
        "queue/unfinished.py",
        "                    self._append({image_id: None})\n",
        "                    pass\n",
        "tests/queue/test_image_files.py",
    ),
    Mutant(
        "the first person shows at once",
        "queue/people_table.py",
        "        with self._looking:\n            self._any = False, 0.0\n",
        "        pass\n",
        "tests/queue/test_people_table.py",
    ),
    Mutant(
        "people of another process show after a second",
        "queue/people_table.py",
        "ANY_SECONDS = 1.0\n",
        "ANY_SECONDS = 60.0\n",
        "tests/queue/test_people_table.py",
    ),
    Mutant(
        "no preview for nobody",
        "workers/job_runner.py",
        '        if self._events.anybody_hears("progress"):\n',
        "        if True:\n",
        "tests/workers/test_dispatcher.py",
    ),
    Mutant(
        "reports of the memory have a distance",
        "workers/local_engine.py",
        "        if now - self._last < REPORT_SECONDS:\n",
        "        if False:\n",
        "tests/workers/test_local_engine.py",
    ),
    Mutant(
        "images from before anybody listened",
        "workers/client.py",
        '            if ended or kind == "image":\n',
        '            if kind == "image":\n',
        "tests/workers/test_client.py",
    ),
    Mutant(
        "a client that goes away",
        "server/intake.py",
        "        await asyncio.wait((waiting, gone, stuck), return_when=asyncio.FIRST_COMPLETED)\n",
        "        await asyncio.wait((waiting, stuck), return_when=asyncio.FIRST_COMPLETED)\n",
        "tests/server/test_native.py",
    ),
    Mutant(
        "what cannot be done is refused",
        "server/apis/a1111_fields.py",
        '            refuse(FIELDS, "", name, value)\n',
        "            pass\n",
        "tests/server/test_a1111.py",
    ),
    Mutant(
        "who sets nothing takes nobody's place",
        "server/clients.py",
        "        if not options:\n            return\n",
        "",
        "tests/server/test_a1111.py",
    ),
    Mutant(
        "a title's hash is its model's",
        "server/apis/a1111_titles.py",
        "        if not named.digest.startswith(mark):\n",
        "        if False:\n",
        "tests/server/test_a1111.py",
    ),
    Mutant(
        "a job's delay is counted with its end",
        "queue/database.py",
        "            if seconds:\n",
        "            if False:\n",
        "tests/queue/test_database.py",
    ),
    Mutant(
        "the key is asked for",
        "server/gate.py",
        "        if person is None:\n            if rule.role is not None",
        "        if person is None:\n            if False and rule.role is not None",
        "tests/server/test_native.py::test_the_key_is_asked_for_everywhere_but_health",
    ),
    Mutant(
        "tensors fill a file without overlap",
        "files/safetensors.py",
        "        if info.offset < at:\n",
        "        if False:\n",
        "tests/files/test_safetensors.py::test_each_bad_file_has_its_message",
    ),
    Mutant(
        "trailing bytes are refused",
        "files/safetensors.py",
        "    if trailing:\n",
        "    if False:\n",
        "tests/files/test_safetensors.py::test_each_bad_file_has_its_message",
    ),
    Mutant(
        "an adapter's strengths are in its name",
        "pipeline/adapter_stack.py",
        "return json.dumps([self.source.digest, self.scale, strengths])",
        "return json.dumps([self.source.digest, self.scale])",
        "tests/adapters/test_state.py::test_state_07_every_strength_is_part_of_the_key",
    ),
    Mutant(
        "adapters are summed in one order",
        "pipeline/adapter_stack.py",
        "key=lambda layer: layer.content_key)",
        "key=lambda layer: 0)",
        "tests/adapters/test_state.py::test_neither_order_nor_a_strength_of_nothing_changes_a_bit",
    ),
    Mutant(
        "what lies over weights comes out as before",
        "memory/source.py",
        "        if self.checksums.setdefault(key, checksums) != checksums:\n",
        "        if False:\n",
        "tests/models/test_streamed.py::test_what_comes_out_otherwise_than_before_is_an_error",
    ),
    Mutant(
        "an adapter in memory is summed before it is used",
        "pipeline/adapter_stack.py",
        "            if not self._lease.verify_segment(index):\n",
        "            if False:\n",
        "tests/adapters/test_state.py::test_another_strength_is_not_made_of_spoiled_bytes",
    ),
    Mutant(
        "what was kept on disk is known again",
        "memory/source.py",
        "        if self.source.compute_checksums(buffer) == known:\n",
        "        if True:\n",
        "tests/models/test_streamed.py::test_what_was_kept_on_disk_and_spoiled_there_is_computed_again",
    ),
    Mutant(
        "a combination has a name of its own",
        "memory/segments.py",
        "        return underlying + _overlay_key(component) if own else underlying\n",
        "        return underlying\n",
        "tests/adapters/test_state.py",
    ),
    Mutant(
        "what fits nothing is refused",
        "resolve/adapters.py",
        "    if match.unknown and not lenient:\n",
        "    if False:\n",
        "tests/adapters/test_state.py::test_what_is_wrong_is_said_and_the_next_is_right",
    ),
    Mutant(
        "an adapter's shapes are its model's",
        "resolve/adapters.py",
        "    if match.mismatched or not match.count:\n",
        "    if False:\n",
        "tests/adapters/test_state.py::test_what_is_wrong_is_said_and_the_next_is_right",
    ),
    Mutant(
        "an adapter's content is the one that was added",
        "catalog/adapters.py",
        "        if fresh.digest != adapter.digest:\n",
        "        if False:\n",
        "tests/adapters/test_state.py",
    ),
    Mutant(
        "an input image is the one that was given",
        "catalog/inputs.py",
        "        if _digest(image) != digest:\n",
        "        if False:\n",
        "tests/pipeline/test_pictures.py::test_an_image_is_kept_by_its_content_and_made_again",
    ),
    Mutant(
        "what a mask leaves stays",
        "pipeline/canvas.py",
        "PILImage.composite(pasted, self.original, self.paste_mask)",
        "pasted",
        "tests/pipeline/test_pictures.py::test_outside_of_the_mask_every_pixel_stays",
    ),
    Mutant(
        "what text encoders made is kept by its checkpoint and adapters",
        "pipeline/conditioning.py",
        "what = [self.family.name, self.role, *(one.digest for one in components), *overlays]",
        "what = [self.family.name, self.role]",
        "tests/pipeline/test_prompts.py",
    ),
    Mutant(
        "what text encoders made is kept by adapters' strengths",
        "pipeline/conditioning.py",
        'one.overlay_digest if isinstance(one, OverlaidComponent) else ""',
        '""',
        "tests/pipeline/test_prompts.py",
    ),
    Mutant(
        "what text encoders made is summed before it is used",
        "pipeline/conditioning.py",
        "            if _sums(found[0]) != found[1]:\n",
        "            if False:\n",
        "tests/pipeline/test_prompts.py::test_what_was_spoiled_is_encoded_again",
    ),
    Mutant(
        "an embedding takes tokens that no prompt has",
        "request/prompts/words.py",
        "            if token not in taken:\n",
        "            if True:\n",
        "tests/request/prompts/test_words.py::test_tokens_are_taken_that_no_prompt_has",
    ),
    Mutant(
        "an image that is made again has only the words that it had",
        "resolve/inversions.py",
        "    if asked is None:\n",
        "    if not asked:\n",
        "tests/adapters/test_inversion.py::test_what_the_image_says_makes_it_again",
    ),
    Mutant(
        "tiling is put back",
        "boundary/pictures.py",
        "        for name, value in before.items():\n",
        "        for name, value in ():\n",
        "tests/pipeline/test_passes.py::test_state_24_decoding_in_tiles_equals_diffusers_and_changes_no_later_image",
    ),
    Mutant(
        "seamless convolutions are a skeleton of their own",
        "models/skeleton.py",
        '    slice_size: str = "auto"\n    seamless: str = ""\n',
        '    slice_size: str = "auto"\n    seamless: str = field(default="", compare=False)\n',
        "tests/pipeline/test_passes.py::test_seamless_images_go_on_at_their_other_side",
    ),
    Mutant(
        "a ControlNet leaves room for the UNet beside it",
        "pipeline/stages.py",
        "            sum(least[:index]),\n",
        "            0,\n",
        "tests/adapters/test_controlnet.py::test_what_comes_beside_leaves_the_least_for_the_others",
    ),
    Mutant(
        "a ControlNet fits the UNet, or is refused",
        "families/sd/recognition.py",
        "        if its != ours:\n",
        "        if False:\n",
        "tests/adapters/test_controlnet.py::test_what_does_not_fit_is_refused_by_name",
    ),
    Mutant(
        "conditions are those of the step",
        "pipeline/denoise.py",
        "work.conditions.distinct[work.conditions.index_at(index / len(timesteps))]",
        "work.conditions.distinct[work.conditions.index_by_step[0]]",
        "tests/pipeline/test_prompts.py",
    ),
    Mutant(
        "a pickled adapter is watched",
        "catalog/adapters.py",
        "files=(*manifest.files, FileStamp.of(path))",
        "files=manifest.files",
        "tests/adapters/test_inversion.py::test_a_pickle_is_converted_once_and_watched",
    ),
    Mutant(
        "names in pickles that weights do not need are remembered",
        "files/inert.py",
        '            self.wanted[f"{module}.{name}"] = None\n',
        "            pass\n",
        "tests/files/test_pickle.py::test_what_wants_to_run_is_refused_by_name",
    ),
    Mutant(
        "instructions of a pickle are counted",
        "files/inert.py",
        "        self._left -= count\n",
        "        pass\n",
        "tests/files/test_inert.py::test_bombs_take_neither_time_nor_memory",
    ),
    Mutant(
        "a changed record has a new card",
        "catalog/index.py",
        "if name in known and known[name][0] == stamp:",
        "if name in known:",
        "tests/catalog/test_index.py::test_another_content_under_the_same_name_is_seen",
    ),
    Mutant(
        "a stored card belongs to the record as it is now",
        "catalog/index.py",
        "if name in stored and stored[name][0] == stamp:",
        "if name in stored:",
        "tests/catalog/test_index.py",
    ),
    Mutant(
        "files are read without the lock",
        "memory/residency.py",
        "            self.read(lease)\n            for finished in awaited:",
        "            with self.lock:\n                self.read(lease)\n            for finished in awaited:",
        "tests/memory/test_beside.py",
    ),
    Mutant(
        "what is being read counts as resident",
        "memory/segment_table.py",
        "return (*residents, *(Resident(piece, self._clock, pending_as_held) for piece in self.pending))",
        "return tuple(residents)",
        "tests/memory/test_beside.py",
    ),
    Mutant(
        "an image waits for what is held as a prefetch",
        "memory/planner.py",
        "        temporary = self.table.pending or (self.table.prefetches and lease not in self.table.prefetches)\n",
        "        temporary = self.table.pending\n",
        "tests/memory/test_beside.py::test_an_image_gets_its_room_on_the_host_beside_a_prefetch",
    ),
    Mutant(
        "a copy that was not summed has checksums",
        "memory/host_source.py",
        "return Unverified(self._source.known_sum(piece))",
        "return None",
        "tests/memory/test_behind.py::test_a_copy_that_was_not_summed_is_known_wrong_later",
    ),
    Mutant(
        "what fits a model is not the process's",
        "catalog/adapters.py",
        "        if self._inversions.generation != self.index.generation:\n",
        "        if self._inversions.generation < 0:\n",
        "tests/adapters/test_inversion.py",
    ),
    Mutant(
        "a version that does not start is not taken",
        "diagnostics/environment.py",
        "            if try_out:\n",
        "            if False:\n",
        "tests/diagnostics/test_environment.py::test_a_version_that_does_not_start_is_not_taken",
    ),
    Mutant(
        "an index is the only place that is looked at",
        "diagnostics/environment.py",
        "    if isolated:\n",
        "    if False:\n",
        "tests/diagnostics/test_environment.py::test_an_index_is_the_only_place_that_is_looked_at",
    ),
    Mutant(
        "an upgrade installs no other package",
        "diagnostics/sources.py",
        "    if found != NAME:\n",
        "    if False:\n",
        "tests/diagnostics/test_sources.py",
    ),
    Mutant(
        "an index is read over https",
        "diagnostics/sources.py",
        'if parts.scheme == "http" and',
        "if False and",
        "tests/diagnostics/test_sources.py",
    ),
    Mutant(
        "an upgrade changes no environment that is there",
        "diagnostics/environment.py",
        "            python = str(installation.python_of(prefix))\n",
        "            python = str(start.python)\n",
        "tests/diagnostics/test_environment.py::test_each_version_stays_as_it_is",
    ),
    Mutant(
        "an input image that something names stays",
        "catalog/inputs.py",
        "if path.stem not in in_use and DIGEST",
        "if _DIGEST",
        "tests/catalog/test_inputs.py::test_what_nothing_names_goes_to_the_trash_and_comes_back_when_it_is_named",
    ),
    Mutant(
        "a young input image stays",
        "catalog/inputs.py",
        "now - path.stat().st_mtime > YOUNG_SECONDS",
        "True",
        "tests/catalog/test_inputs.py::test_what_nothing_names_goes_to_the_trash_and_comes_back_when_it_is_named",
    ),
    Mutant(
        "a mask is its lightness times its alpha",
        "catalog/inputs.py",
        'return ImageChops.multiply(picture.convert("RGB").convert("L"), picture.getchannel("A"))',
        'return picture.convert("RGB").convert("L")',
        "tests/catalog/test_inputs.py",
    ),
    Mutant(
        "each image of jobs in turns is a switch",
        "workers/local_engine.py",
        "                self._call_on_switch(contents.model, resources)\n",
        "                if index == first:\n                    self._call_on_switch(contents.model, resources)\n",
        "tests/diagnostics/test_canary.py::test_images_of_two_jobs_in_turns_are_switches",
    ),
    Mutant(
        "a refiner continues the random numbers of the model",
        "pipeline/denoise.py",
        "        generator.set_state(start.generator_state)\n",
        "        pass\n",
        "tests/pipeline/test_refiner.py::test_pixels_are_those_of_diffusers",
    ),
    Mutant(
        "a refiner has the latents of the model",
        "resolve/check.py",
        "    if (\n"
        "        model_family.latent_space != refiner_family.latent_space\n"
        "        or model_family.noise != refiner_family.noise\n"
        "        or not model_family.same_latents(*vaes)\n"
        "    ):\n",
        "    if False:\n",
        "tests/pipeline/test_refiner.py::test_what_cannot_be_is_refused",
    ),
    Mutant(
        "a component comes from files that are unchanged",
        "catalog/catalog.py",
        '            if card.state() != "there":\n                continue\n',
        "",
        "tests/catalog/test_catalog.py::test_a_component_is_used_from_another_file_when_its_own_is_gone",
    ),
    Mutant(
        "a client compares the pixels that arrive",
        "workers/client.py",
        '        if received != entry["pixels_sha256"]:\n',
        "        if False:\n",
        "tests/workers/test_client.py",
    ),
    Mutant(
        "what another lease knows of shared weights",
        "pipeline/stages.py",
        "        wrong = lease.corrupted\n",
        "        wrong: list[str] = []\n",
        "tests/pipeline/test_memory.py::test_weights_that_another_lease_knows_to_be_wrong_make_no_image",
    ),
    Mutant(
        "tags are set aside before choices are read",
        "request/prompts/tags.py",
        "return _EITHER.sub(lambda tag: change(tag[0]), text)",
        "return text",
        "tests/request/prompts/test_variants.py",
    ),
    Mutant(
        "a stored request that cannot be read fails alone",
        "queue/documents.py",
        "    except (SafelightError, KeyError, TypeError, ValueError, AttributeError) as error:\n",
        "    except ZeroDivisionError as error:\n",
        "tests/queue/test_database.py::test_a_request_that_cannot_be_read_is_a_job_that_says_so",
    ),
    Mutant(
        "images are seen by their person",
        "queue/image_table.py",
        "self._visible = true() if person.sees_all else or_(self._own, shown)",
        "self._visible = true()",
        "tests/server/test_people.py",
    ),
    Mutant(
        "images are changed by their person",
        "queue/image_table.py",
        "true() if person.sees_all else ImageRow.person == person.name",
        "true()",
        "tests/server/test_people.py",
    ),
    Mutant(
        "jobs are seen by their person",
        "server/intake.py",
        "job if job is not None and who.owns(job.person) else None",
        "job",
        "tests/server/test_people.py",
    ),
    Mutant(
        "roles are checked",
        "server/gate.py",
        "        elif rule.role is not None and _is_api(scope) and not person.may(rule.role):\n",
        "        elif False:\n",
        "tests/server/test_people.py",
    ),
    Mutant(
        "events reach their person",
        "server/bridge.py",
        " and (event.person is None or who.owns(event.person))",
        "",
        "tests/server/test_people.py",
    ),
    Mutant(
        "input images are used by who sent them",
        "server/intake.py",
        "        if DIGEST.fullmatch(given) and not control.database.input_owners.may_use(who, given):\n",
        "        if False:\n",
        "tests/server/test_people.py",
    ),
    Mutant(
        "passwords are tried only so often",
        "server/access.py",
        "        if not (of_address and self._limiter.hit(OF_NAME, name.lower(), address)):\n",
        "        if False:\n",
        "tests/server/test_people.py",
    ),
    Mutant(
        "a drained slot gets no later job",
        "workers/choosing.py",
        "        with self._lock:\n            slot.draining = draining\n",
        "        slot.draining = draining\n",
        "tests/workers/test_slots.py",
    ),
)


def red(mutant: Mutant) -> tuple[bool, float, str]:
    """Whether the tests failed, in how many seconds, and the first that did."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(HOME / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / "safelight" / mutant.file
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.name}: its place is found {text.count(mutant.old)} times in {mutant.file}")
        changed = text.replace(mutant.old, mutant.new)
        if "field(" in mutant.new:
            changed = changed.replace("from dataclasses import dataclass", "from dataclasses import dataclass, field")
        path.write_text(changed)
        command = [sys.executable, "-m", "pytest", *mutant.tests.split(), "-x", "-q", "--no-header", "-m", "not proof"]
        command += ["-p", "no:cacheprovider", "--no-cov", "-p", "no:randomly"]
        environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=HOME, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return True, time.perf_counter() - start, "it hung"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        what = failed[0].split(" - ")[0].split("::")[-1] if failed else done.stdout[-300:]
        # 1: tests failed; anything else than 0 and 1 says that they could not even be collected.
        if done.returncode not in (0, 1):
            raise SystemExit(f"{mutant.name}: its tests do not run: {done.stdout[-600:]}{done.stderr[-300:]}")
        return done.returncode == 1, time.perf_counter() - start, what


def main() -> None:
    names = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    start = time.perf_counter()
    survived: list[str] = []
    print("| protection | where | seconds | what goes red without it |\n|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(2) as pool:
        for mutant, (was_red, seconds, what) in zip(chosen, pool.map(red, chosen), strict=True):
            told = f"`{what}`" if was_red else "**nothing**"
            print(f"| {mutant.name} | `{mutant.file}` | {seconds:.0f} | {told} |", flush=True)
            survived += [] if was_red else [mutant.name]
    print(f"\n{len(chosen) - len(survived)} of {len(chosen)} went red, in {time.perf_counter() - start:.0f} s")
    raise SystemExit(1 if survived else 0)


if __name__ == "__main__":
    main()
