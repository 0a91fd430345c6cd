"""An API for curl: `curl 'localhost:9090/curl/draw?prompt=apple' --output apple.png`."""

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse

import safelight
from safelight.server import access, bridge, intake
from safelight.server.problems import of_job


def router(services):
    api = APIRouter(prefix="/curl", tags=["curl"])

    @api.get("/draw")
    async def draw(http: Request, prompt: str, steps: int = 20, seed: int = 0) -> FileResponse:
        """Make an image with the default model, and return it."""
        model = await bridge.run(intake.default_model, services)
        request = safelight.Request(prompt, model.name, steps=steps, seed=seed)
        who = access.person_of(http)
        [job] = await bridge.run(lambda: intake.accept(services, request, who=who, client="curl"))
        job = await intake.ended(services, job, http)
        if job.state != "done":
            raise of_job(job)
        [image] = await bridge.run(lambda: services.database.images.of_job(job.id))
        return FileResponse(services.gallery.path(image), media_type="image/png")

    return api
