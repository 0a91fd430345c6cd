"""Who has sent which input image. Each method is one transaction.

Input images are stored by their content, so several people may have sent the same.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import String, cast, or_, select

from safelight.queue.person import Person
from safelight.queue.sql_database import SqlDatabase
from safelight.queue.tables import BoardRow, ImageRow, InputOwnerRow
from safelight.request.input_pictures import PICTURE_FIELDS, PICTURE_LISTS


class InputOwnerTable:
    """The owners of input images in a database."""

    def __init__(self, file: SqlDatabase) -> None:
        self._file = file

    def add(self, person: str, digests: Collection[str]) -> None:
        """Note that a person has sent input images."""
        if not digests:
            return
        with self._file.writing() as session:
            for digest in digests:
                session.merge(InputOwnerRow(digest=digest, person=person))

    def of(self, person: str) -> list[str]:
        """Return the digests of the input images that a person has sent. Some may be deleted."""
        with self._file.session() as session:
            return list(session.scalars(select(InputOwnerRow.digest).where(InputOwnerRow.person == person)))

    def may_use(self, person: Person, digest: str) -> bool:
        """Return whether a person may see an input image: they sent it, or an image that they see was made from it."""
        if person.sees_all:
            return True
        own = select(ImageRow.id).where(ImageRow.person == person.name)
        shared = select(ImageRow.id).join(BoardRow, ImageRow.board == BoardRow.id)
        shared = shared.where(BoardRow.shared, ImageRow.trashed.is_(None))
        # Only what the image was made from: any other text of the request may name any digest.
        request = ImageRow.image_metadata["request"]
        lists = (cast(request[name], String).contains(f'"{digest}"') for name in PICTURE_LISTS)
        named = or_(*(request[name].as_string() == digest for name in PICTURE_FIELDS), *lists)
        with self._file.session() as session:
            if session.get(InputOwnerRow, (digest, person.name)) is not None:
                return True
            return any(session.scalar(query.where(named).limit(1)) is not None for query in (shared, own))
