"""Runs Open WebUI's own image code against a server: models, an image, and an edit, by both of its engines.

Arguments: the path of ``open_webui/routers/images.py``, the address of the server, the name of a model.
The file imports the rest of Open WebUI (a database, redis, …). Stand-ins take the place of those modules.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

IMAGES, URL, MODEL = sys.argv[1:]
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC"
)
config = {
    "image_generation.enable": True,
    "image_generation.engine": "automatic1111",
    "image_generation.model": "",
    "image_generation.size": "64x64",
    "image_generation.steps": 2,
    "image_generation.automatic1111.base_url": URL,
    "image_generation.automatic1111.api_auth": "",
    "image_generation.automatic1111.api_params": {},
    "image_generation.openai.api_base_url": f"{URL}/v1",
    "image_generation.openai.api_key": "sk-test",
    "image_generation.openai.api_version": "",
    "image_generation.openai.params": {},
    "images.edit.enable": True,
    "images.edit.engine": "openai",
    "images.edit.model": MODEL,
    "images.edit.size": "64x64",
    "images.edit.openai.api_base_url": f"{URL}/v1",
    "images.edit.openai.api_key": "sk-test",
    "images.edit.openai.api_version": "",
    "user.permissions": {},
}


def stand_in(name: str, **names: object) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(names)
    module.__path__ = []
    sys.modules[name] = module


class Config:
    @staticmethod
    async def get_many(*keys):
        return {key: config[key] for key in keys if key in config}

    @staticmethod
    async def upsert(updates):
        config.update(updates)


class Words:
    def __getattr__(self, name):
        return lambda *given: " ".join(map(str, given)) or name

    ACCESS_PROHIBITED = "access prohibited"
    INVALID_URL = "invalid url"


async def nothing(*_, **__):
    return None


async def main() -> None:
    import aiohttp

    session = aiohttp.ClientSession()

    async def get_session():
        return session

    for name in ("", ".internal", ".models", ".retrieval", ".retrieval.web", ".routers", ".utils", ".utils.images"):
        stand_in(f"open_webui{name}")
    pattern = "^gpt-image"
    stand_in(
        "open_webui.config",
        CACHE_DIR=Path(tempfile.mkdtemp()),
        ENABLE_OPENAI_IMAGE_EDIT_NORMALIZATION=True,
        IMAGE_AUTO_SIZE_MODELS_REGEX_PATTERN=pattern,
        IMAGE_URL_RESPONSE_MODELS_REGEX_PATTERN=pattern,
    )
    stand_in("open_webui.constants", ERROR_MESSAGES=Words())
    stand_in(
        "open_webui.env",
        AIOHTTP_CLIENT_ALLOW_REDIRECTS=False,
        AIOHTTP_CLIENT_SESSION_SSL=True,
        ENABLE_FORWARD_USER_INFO_HEADERS=False,
    )
    stand_in("open_webui.events", EVENTS=Words(), publish_event=nothing)
    stand_in("open_webui.internal.db", get_async_session=nothing)
    stand_in("open_webui.models.chats", Chats=object())
    stand_in("open_webui.models.config", Config=Config)
    stand_in("open_webui.retrieval.web.utils", get_ssrf_safe_session=None, validate_url=lambda _: True)
    stand_in("open_webui.routers.files", get_file_content_by_id=nothing, upload_file_handler=nothing)
    stand_in("open_webui.utils.access_control", has_permission=nothing)
    stand_in("open_webui.utils.auth", get_admin_user=nothing, get_verified_user=nothing)
    stand_in("open_webui.utils.headers", include_user_info_headers=lambda headers, _: headers)
    forms = ("ComfyUICreateImageForm", "ComfyUIEditImageForm", "ComfyUIWorkflow")
    comfy = dict.fromkeys(("comfyui_create_image", "comfyui_edit_image", "comfyui_upload_image"), nothing)
    stand_in("open_webui.utils.images.comfyui", **{form: type(form, (), {}) for form in forms}, **comfy)
    stand_in("open_webui.utils.json_codec", JSONCodec=json)
    stand_in("open_webui.utils.session_pool", get_session=get_session)
    stand_in("sqlalchemy.ext.asyncio", AsyncSession=type("AsyncSession", (), {}))
    spec = importlib.util.spec_from_file_location("open_webui.routers.images", IMAGES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    saved: list[bytes] = []

    async def upload_image(request, image_data, content_type, metadata, user, db=None):
        del request, metadata, user, db
        assert content_type == "image/png"
        saved.append(image_data)
        return None, {"content_type": content_type}

    module.upload_image, module.get_session = upload_image, get_session
    admin = types.SimpleNamespace(role="admin", id="1")
    checked = module.ConnectionVerificationForm(engine="automatic1111", url=URL, key="")
    await module.verify_connection(checked, admin)
    models = await module.get_models(None, admin)
    title = next(row["id"] for row in models if row["id"].startswith(MODEL))
    await module.set_image_model(None, title)
    ask = module.CreateImageForm(prompt="a cat", n=1, size="64x64", steps=2, negative_prompt="bad", model=title)
    await module.image_generations(None, ask, user=admin)
    await module.image_generations(None, module.CreateImageForm(prompt="a cat"), user=admin)
    config.update({"image_generation.engine": "openai", "image_generation.model": MODEL})
    await module.image_generations(None, module.CreateImageForm(prompt="a cat", n=1), user=admin)
    picture = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    edit = module.EditImageForm(image=picture, prompt="blue", n=1, size="64x64", background="opaque")
    await module.image_edits(None, edit, user=admin)
    await session.close()
    print(json.dumps({"models": len(models), "images": [base64.b64encode(one).decode() for one in saved]}))


asyncio.run(main())
