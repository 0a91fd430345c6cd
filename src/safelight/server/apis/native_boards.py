"""Routes for boards: named groups of images."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath
from starlette.responses import Response

from safelight.assembly.services import Services
from safelight.queue.events import Event
from safelight.queue.stored_image import Board
from safelight.server.apis.native_image_fields import HEX, BoardName
from safelight.server.problems import RefusedError, documented, found

BoardId = Annotated[str, InPath(pattern=HEX, description="a board's identifier")]


class BoardRoutes:
    """The routes for boards. An image is on one board or on none."""

    def __init__(self, control: Services) -> None:
        self._control, self._table = control, control.database.images

    def add_to(self, api: APIRouter) -> None:
        """Add the routes to a router."""
        api.get("/boards", tags=["images"])(self.boards)
        api.post("/boards", tags=["images"], status_code=201)(self.add)
        api.patch("/boards/{board_id}", tags=["images"], responses=documented(404))(self.rename)
        api.delete("/boards/{board_id}", tags=["images"], status_code=204, responses=documented(404))(self.delete)

    def boards(self) -> list[Board]:
        """List the boards by name."""
        return self._table.boards()

    def add(self, asked: BoardName) -> Board:
        """Add a board."""
        board = self._table.add_board(asked.name.strip())
        self._tell()
        return board

    def rename(self, board_id: BoardId, asked: BoardName) -> Board:
        """Rename a board."""
        board = found(self._table.rename_board(board_id, asked.name.strip()), "board", board_id)
        self._tell()
        return board

    def delete(self, board_id: BoardId) -> Response:
        """Delete a board. Its images stay, on no board."""
        if not self._table.delete_board(board_id):
            raise RefusedError(404, "not_found", f"there is no board {board_id}")
        self._tell()
        return Response(status_code=204)

    def _tell(self) -> None:
        self._control.events.tell(Event("boards", ""))
