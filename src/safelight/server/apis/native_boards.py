"""Routes for boards: named groups of images."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.queue.events import Event
from safelight.queue.stored_image import Board
from safelight.server.access import Who
from safelight.server.apis.native_image_fields import HEX, BoardChange, BoardName
from safelight.server.problems import RefusedError, documented, found

BoardId = Annotated[str, InPath(pattern=HEX, description="a board's identifier")]


class BoardRoutes:
    """The routes for boards. An image is on one board or on none."""

    def __init__(self, control: Services) -> None:
        self._control, self._table = control, control.database.boards

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/boards", tags=["images"])(self.boards)
        api.post("/boards", tags=["images"], status_code=201)(self.add)
        api.patch("/boards/{board_id}", tags=["images"], responses=documented(404))(self.change)
        api.delete("/boards/{board_id}", tags=["images"], status_code=204, responses=documented(404))(self.delete)

    def boards(self, who: Who) -> list[Board]:
        """List the boards by name: yours and the boards that others share. Administrators see all."""
        return self._table.seen_by(who).all()

    def add(self, asked: BoardName, who: Who) -> Board:
        """Add a board."""
        board = self._table.seen_by(who).add(asked.name.strip())
        self._tell()
        return board

    def change(self, board_id: BoardId, asked: BoardChange, who: Who) -> Board:
        """Rename a board, or share it or not."""
        name = None if asked.name is None else asked.name.strip()
        board = found(self._table.seen_by(who).change(board_id, name, asked.shared), "board", board_id)
        self._tell()
        return board

    def delete(self, board_id: BoardId, who: Who) -> Response:
        """Delete a board. Its images stay, on no board."""
        if not self._table.seen_by(who).delete(board_id):
            raise RefusedError(404, "not_found", f"there is no board {board_id}")
        self._tell()
        return Response(status_code=204)

    def _tell(self) -> None:
        self._control.events.tell(Event("boards", ""))
