"""Taking over the KV of a device whose worker has left: its blocks become cached prefixes of this engine."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from ..errors import InternalError
from .device_kv import DeviceKV
from .generation import LEDGER_KEY, KVSource
from .kv.ledger import BlockRecord, Ledger, record_bytes
from .pages.transfer import PageReader, open_pages
from .service import Service

# Blocks on their way at a time: these are nobody's meanwhile, and running sequences may need blocks.
_BATCH_BLOCKS = 16

_Known = tuple[tuple[int, ...], BlockRecord]


def adopt(service: Service, kv: DeviceKV, source: KVSource, blocks: int) -> None:
    """Take over what the ledger says of ``source``, then give up what is free or cached until ``blocks`` are left.

    Pages of the same pool are mapped. Others are copied, in this thread, into blocks that nobody uses, as many
    as there are; steps go on meanwhile.

    Raises
    ------
    InternalError, OperatorError
        The source cannot be read; what had been copied until then stays.
    """
    if kv.shares_pool(source.pool.address):
        service.call(lambda: _map(service, kv, source.pages, blocks))
    else:
        _copy(service, kv, source)
        service.call(lambda: kv.unmap(service.engine.adopt([], blocks)))


def _map(service: Service, kv: DeviceKV, pages: Sequence[int], blocks: int) -> None:
    read = ((group, kv.ledger.read(group[0])) for group in kv.unmapped(pages))
    known = [(group, record) for group, record in read if record is not None]
    mapped = kv.map([page for group, _ in known for page in group])
    records = [record for _, record in known]
    kv.unmap(service.engine.adopt(list(zip(mapped, records, strict=True)), blocks))


def _copy(service: Service, kv: DeviceKV, source: KVSource) -> None:
    with open_pages(source.source) as reader:
        if reader.geometry.page_bytes != kv.pool.geometry.page_bytes:
            raise InternalError(f"KV of {kv.device}: pool {reader.geometry.name!r} has pages of another size")
        missing = _missing(kv, _read_records(kv, source, reader))
        load = service.engine.load
        missing = missing[max(0, len(missing) - (load.kv_blocks - load.kv_blocks_used)) :]
        while missing:
            blocks = service.engine.reserve(min(len(missing), _BATCH_BLOCKS))
            if not blocks:
                return
            batch, missing = missing[: len(blocks)], missing[len(blocks) :]
            _fill(service, kv, reader, blocks, batch)


def _fill(service: Service, kv: DeviceKV, reader: PageReader, blocks: Sequence[int], batch: Sequence[_Known]) -> None:
    """Copy a batch into reserved blocks, and have the engine index them."""
    records: list[BlockRecord | None] = [None] * len(blocks)
    try:
        reader.read_into([page for pages, _ in batch for page in pages], [kv.memory(block) for block in blocks])
        records = [record for _, record in batch]
    finally:
        service.engine.adopt(list(zip(blocks, records, strict=True)), kv.positions)


def _missing(kv: DeviceKV, theirs: Sequence[_Known]) -> list[_Known]:
    """What cannot be found on this device, the least useful first.

    A running sequence keeps its half-filled block to itself, so that another one's is wanted even if it is the same.
    """
    ours = (kv.ledger.read(group[0]) for group in kv.grouped(kv.pages))
    found = {(r.prefix, r.tokens) for r in ours if r is not None and not (r.used and len(r.tokens) < kv.block_tokens)}
    missing = [known for known in theirs if (known[1].prefix, known[1].tokens) not in found]
    return sorted(missing, key=lambda known: known[1].eviction_rank)


def _read_records(kv: DeviceKV, source: KVSource, reader: PageReader) -> list[_Known]:
    """Blocks of the source, by their pages, of which its ledger knows anything."""
    size, stride = reader.geometry.page_bytes, record_bytes(kv.block_tokens)
    groups = kv.grouped(source.pages)
    ledger_pages = source.pool.pages.get(LEDGER_KEY, ())
    if len(ledger_pages) * size < reader.geometry.pages * stride:
        raise InternalError(f"pool {source.pool.name!r}: its ledger is missing or too small")
    wanted = sorted({at // size for g in groups for at in (g[0] * stride, (g[0] + 1) * stride - 1)})
    memory = memoryview(mmap.mmap(-1, len(ledger_pages) * size))  # only what is read takes memory
    reader.read_into([ledger_pages[i] for i in wanted], [memory[i * size : (i + 1) * size] for i in wanted])
    ledger = Ledger(memory, stride, kv.block_tokens)
    found = [(group, ledger.read(group[0])) for group in groups]
    return [(group, record) for group, record in found if record is not None]
