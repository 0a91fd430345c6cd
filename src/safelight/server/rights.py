"""What each role may do: the role that a route needs. A route that is not listed is for administrators only.

The rules hold where the server knows people. Without people, anyone who can reach the server is its administrator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from safelight.queue.person import Role

OPEN = """
GET /api/v1/health  GET /api/v1/ready  GET /api/v1/me  POST /api/v1/login
"""
"""Routes that need no log-in."""

GUEST = """
POST /api/v1/logout  PUT /api/v1/me/password  GET /api/v1/me/keys  POST /api/v1/me/keys  DELETE /api/v1/me/keys/{id}
POST /api/v1/generate  POST /api/v1/estimate  POST /api/v1/preprocess  POST /api/v1/tokens
GET /api/v1/grid/fields  POST /api/v1/grid  GET /api/v1/fields  GET /api/v1/families
GET /api/v1/jobs  GET /api/v1/jobs/{id}  PATCH /api/v1/jobs/{id}  POST /api/v1/jobs/{id}/cancel
GET /api/v1/jobs/{id}/images  GET /api/v1/queue  POST /api/v1/queue/cancel  PUT /api/v1/queue/order
GET /api/v1/events  POST /api/v1/inputs  GET /api/v1/inputs/{digest}
GET /api/v1/presets  PUT /api/v1/presets/{name}  DELETE /api/v1/presets/{name}
GET /api/v1/images  PATCH /api/v1/images  GET /api/v1/images/count  GET /api/v1/images/ids  GET /api/v1/images/facets
POST /api/v1/images/details  POST /api/v1/images/delete  POST /api/v1/images/export
GET /api/v1/images/{id}  DELETE /api/v1/images/{id}  GET /api/v1/images/{id}/file
GET /api/v1/images/{id}/thumbnail  GET /api/v1/images/{id}/generation-data  POST /api/v1/pictures/read
GET /api/v1/boards  POST /api/v1/boards  PATCH /api/v1/boards/{id}  DELETE /api/v1/boards/{id}
GET /api/v1/models  GET /api/v1/models/{name}  GET /api/v1/models/{name}/preview
GET /api/v1/adapters  GET /api/v1/adapters/{name}/preview  GET /api/v1/catalogue
GET /api/v1/slots  GET /api/v1/memory  GET /api/v1/openapi.json
GET /v1/models  GET /v1/models/{name}
POST /v1/images/generations  POST /v1/images/edits  POST /v1/images/variations
POST /sdapi/v1/txt2img  POST /sdapi/v1/img2img  GET /sdapi/v1/progress  POST /sdapi/v1/interrupt  POST /sdapi/v1/skip
GET /sdapi/v1/options  POST /sdapi/v1/options  GET /sdapi/v1/sd-models  GET /sdapi/v1/sd-vae  GET /sdapi/v1/loras
GET /sdapi/v1/embeddings  GET /sdapi/v1/hypernetworks  GET /sdapi/v1/prompt-styles  GET /sdapi/v1/face-restorers
GET /sdapi/v1/realesrgan-models  POST /sdapi/v1/refresh-checkpoints  POST /sdapi/v1/refresh-loras
POST /sdapi/v1/refresh-vae  POST /sdapi/v1/refresh-embeddings  GET /sdapi/v1/samplers  GET /sdapi/v1/schedulers
GET /sdapi/v1/upscalers  GET /sdapi/v1/latent-upscale-modes  GET /sdapi/v1/scripts  GET /sdapi/v1/script-info
GET /sdapi/v1/extensions  POST /sdapi/v1/extra-single-image  POST /sdapi/v1/extra-batch-images
POST /sdapi/v1/png-info  GET /sdapi/v1/cmd-flags  GET /sdapi/v1/memory  POST /sdapi/v1/interrogate
GET /internal/ping  GET /controlnet/model_list  GET /controlnet/module_list  GET /controlnet/version
GET /mcp  POST /mcp  DELETE /mcp
"""
"""Routes for everyone who has logged in. Of jobs, images and boards, they return only what the person may see."""

MEMBER = """
POST /api/v1/models  PUT /api/v1/models/{name}/preview  PUT /api/v1/adapters/{name}/preview
GET /api/v1/downloads  POST /api/v1/downloads  GET /api/v1/downloads/{id}  POST /api/v1/downloads/{id}/cancel
POST /api/v1/models/{name}/load  POST /api/v1/models/{name}/verify  POST /api/v1/images/{id}/check
POST /sdapi/v1/unload-checkpoint  POST /sdapi/v1/reload-checkpoint
"""
"""Routes for members: they add models, and use more of the machine."""

ADMIN = """
GET /api/v1/people  POST /api/v1/people  PATCH /api/v1/people/{name}  DELETE /api/v1/people/{name}  GET /api/v1/audit
DELETE /api/v1/models/{name}  DELETE /api/v1/adapters/{name}  PUT /api/v1/models/{name}/defaults
POST /api/v1/models/{name}/unload  POST /api/v1/models/{name}/pin  POST /api/v1/models/{name}/unpin
GET /api/v1/models/{name}/earlier  POST /api/v1/models/{name}/rollback
GET /api/v1/compacting  POST /api/v1/models/{name}/compact
GET /api/v1/versions  POST /api/v1/versions/{version}/activate
POST /api/v1/slots/{name}/drain  POST /api/v1/slots/{name}/resume  POST /api/v1/slots/{name}/restart
POST /api/v1/queue/pause  POST /api/v1/queue/resume
GET /api/v1/doctor  POST /api/v1/doctor  GET /api/v1/doctor/soak.png  GET /api/v1/trust
GET /api/v1/settings  PUT /api/v1/settings/{name}  GET /metrics
"""
"""Routes for administrators. They are listed so that a new route is a decision; the tests compare with the server."""

AUDITED_OF_GUESTS = frozenset(
    {
        *("POST /api/v1/images/delete", "DELETE /api/v1/images/{id}"),
        *("POST /api/v1/boards", "PATCH /api/v1/boards/{id}", "DELETE /api/v1/boards/{id}"),
        *("PUT /api/v1/me/password", "POST /api/v1/me/keys", "DELETE /api/v1/me/keys/{id}", "POST /api/v1/logout"),
    }
)
"""The routes for everyone that the audit log has. It has all those for members and administrators that change
something. Requests for images are jobs, which have their person."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route needs. ``role``: None if it is open. ``audited``: whether the audit log has it."""

    role: Role | None
    audited: bool


def rules() -> Mapping[str, Rule]:
    """Return the rule of each route, by method and path; what is in braces stands for any name."""
    return _rules()[0]


def rule_of(method: str, path: str) -> Rule:
    """Return the rule of a request."""
    exact, patterns = _rules()
    asked = f"{'GET' if method == 'HEAD' else method} {path}"
    if asked in exact:
        return exact[asked]
    not_listed = Rule("admin", audited=not asked.startswith("GET "))
    return next((rule for pattern, rule in patterns if pattern.fullmatch(asked)), not_listed)


@cache
def _rules() -> tuple[dict[str, Rule], list[tuple[re.Pattern[str], Rule]]]:
    found: dict[str, Rule] = {}
    texts: tuple[tuple[str, Role | None], ...] = ((OPEN, None), (GUEST, "guest"), (MEMBER, "member"), (ADMIN, "admin"))
    for text, role in texts:
        words = text.split()
        for method, path in zip(words[::2], words[1::2], strict=True):
            route = f"{method} {path}"
            changes = method != "GET" and role in ("member", "admin")
            found[route] = Rule(role, changes or route in AUDITED_OF_GUESTS)
    patterns = [
        (re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(route))), rule)
        for route, rule in found.items()
        if "{" in route
    ]
    return found, patterns
