"""Data races by vector clocks.

Every thread has a clock; known[c][i, j] is the latest clock of thread j of CTA c whose accesses
thread i of the same CTA is ordered after. Synchronising threads learn what each other knew. For
every 2 bytes of memory the last writer and the readers since are kept with their clocks; an access
that is not ordered after a conflicting one is a race, whether or not this run showed a wrong value.
Knowledge about other CTAs, rare, lives in `foreign`.

An asynchronous copy is a write by its thread whose clock is PENDING, which nobody is ordered after,
until the thread waits for it.
"""

import numpy as np

NOBODY, HOST, SEVERAL, EVERYWHERE = -1, -2, -3, -4  # in place of a thread number
PENDING = np.iinfo(np.int32).max


class Race(Exception):
    pass


class Clocks:
    def __init__(self, ctas, per):
        self.ctas, self.per = ctas, per
        self.clock = np.ones(ctas * per, np.int32)
        self.known = np.zeros((ctas, per, per), np.int32)
        self.least = np.zeros(ctas * per, np.int32)  # min over j of known[c, i, j]
        self.foreign = {}  # thread -> [ctas * per] clocks, for threads that acquired something
        self.messages = {}  # address of a flag -> (clocks released to it)
        self.fenced, self.seen = (
            {},
            {},
        )  # thread -> knowledge at its last fence; thread -> messages read since

    def synchronise(self, threads):
        """All of these threads of one CTA wait for each other: a barrier, or a warp-wide one."""
        cta, lanes = threads[0] // self.per, threads % self.per
        now = self.clock[threads].max()
        rows = self.known[cta, lanes].max(0)
        rows[lanes] = now
        self.known[cta, lanes] = rows
        self.least[threads] = rows.min()
        self.clock[threads] = now + 1
        learned = [self.foreign[t] for t in threads if t in self.foreign] if self.foreign else []
        if learned:
            merged = np.maximum.reduce(learned)
            for t in threads:
                self.foreign[int(t)] = merged

    def ordered(self, thread, other, clock):
        """Is each access by `other` at `clock` before what `thread` does now? All arrays."""
        same = other // self.per == thread // self.per
        known = self.known[
            thread // self.per, thread % self.per, np.where(same, other % self.per, 0)
        ]
        result = np.where(same, clock <= known, False) | ((thread == other) & (clock != PENDING))
        if self.foreign and not result.all():
            for i in np.flatnonzero(~result & ~same):
                if (row := self.foreign.get(int(thread[i]))) is not None:
                    result[i] = clock[i] <= row[other[i]]
        return result

    # -- flags in global memory: fence + store or atomic releases, load or atomic + fence acquires
    # --

    def knowledge(self, thread):
        row = np.zeros(self.ctas * self.per, np.int32) + self.foreign.get(thread, np.int32(0))
        cta = thread // self.per
        part = row[cta * self.per : (cta + 1) * self.per]
        np.maximum(part, self.known[cta, thread % self.per], out=part)
        row[thread] = self.clock[thread]
        return row

    def learn(self, thread, row):
        self.foreign[thread] = np.maximum(row, self.foreign.get(thread, np.int32(0)))
        cta = thread // self.per
        mine = self.known[cta, thread % self.per]
        np.maximum(mine, row[cta * self.per : (cta + 1) * self.per], out=mine)
        self.least[thread] = mine.min()

    def fence(self, threads):
        for t in map(int, threads):
            if t in self.seen:
                self.learn(t, self.seen.pop(t))
            self.fenced[t] = self.knowledge(t)
            self.clock[t] += 1

    def flag_write(self, thread, address, release, keep):
        """`keep`: an atomic, which carries on what earlier releases to this flag said."""
        if release:
            self.fence([thread])
        message = self.fenced.get(thread)
        if keep and address in self.messages:
            old = self.messages[address]
            message = old if message is None else np.maximum(message, old)
        if message is not None:
            self.messages[address] = message
        else:
            self.messages.pop(address, None)

    def flag_read(self, thread, address, acquire):
        message = self.messages.get(address)
        if message is None:
            return
        self.seen[thread] = np.maximum(message, self.seen.get(thread, np.int32(0)))
        if acquire:
            self.learn(thread, self.seen.pop(thread))


class Shadow:
    """Last writer and readers of each 2-byte granule of one memory (a buffer, or the shared memory
    of all CTAs)."""

    def __init__(self, granules, clocks, initialised):
        self.clocks = clocks
        self.writer = np.full(granules, HOST, np.int32)
        self.writer[~initialised] = NOBODY
        self.written = np.zeros(granules, np.int32)
        self.reader = np.full(granules, NOBODY, np.int32)
        self.read = np.zeros(granules, np.int32)
        self.crowd = np.full(
            granules, -1, np.int32
        )  # the CTA of the readers, where there are SEVERAL
        self.atomic = np.zeros(granules, bool)  # the last write was an atomic or volatile one

    def on_read(self, at, thread, atomic=False):
        """at, thread: int64 [k], one entry per granule touched by this instruction."""
        writer = self.writer[at]
        check = writer >= 0
        if atomic:
            check &= ~self.atomic[at]
        if check.any():
            self._require(
                at[check],
                thread[check],
                writer[check],
                self.written[at[check]],
                "reads what",
                "wrote",
            )
        if atomic:
            return
        reader, before = self.reader[at], self.read[at]
        fresh = reader == NOBODY
        single = reader >= 0
        fresh[single] = (reader[single] == thread[single]) | self.clocks.ordered(
            thread[single], reader[single], before[single]
        )
        crowd = reader == SEVERAL
        if crowd.any():
            fresh[crowd] = self._after_all_readers(at[crowd], thread[crowd])
        cta = thread // self.clocks.per
        elsewhere = ~fresh & (reader == EVERYWHERE)
        elsewhere |= ~fresh & (reader >= 0) & (reader // self.clocks.per != cta)
        elsewhere |= ~fresh & crowd & (self.crowd[at] != cta)
        now = self.clocks.clock[thread]
        value = np.where(fresh, thread, np.where(elsewhere, EVERYWHERE, SEVERAL))
        self.reader[at] = value
        self.read[at] = np.where(fresh, now, np.maximum(before, now))
        # lanes of this instruction that read the same granule overwrote each other
        lost = self.reader[at] != value
        lost |= (value >= 0) & (self.reader[at] != thread)
        if lost.any():
            self.crowd[at[lost]] = cta[lost]
            self.reader[at[lost]] = SEVERAL
        members = self.reader[at] == SEVERAL
        if members.any():
            self.crowd[at[members]] = cta[members]
            self.reader[at[members & (self.crowd[at] != cta)]] = EVERYWHERE
            np.maximum.at(self.read, at, now)

    def on_write(self, at, thread, atomic=False, pending=False):
        writer = self.writer[at]
        check = writer >= 0
        if atomic:
            check &= ~self.atomic[at]
        if check.any():
            self._require(
                at[check],
                thread[check],
                writer[check],
                self.written[at[check]],
                "writes what",
                "wrote",
            )
        reader = self.reader[at]
        check = reader >= 0
        if check.any():
            self._require(
                at[check], thread[check], reader[check], self.read[at[check]], "writes what", "read"
            )
        crowd = reader == SEVERAL
        if crowd.any() and not (ok := self._after_all_readers(at[crowd], thread[crowd])).all():
            i = np.flatnonzero(crowd)[np.flatnonzero(~ok)[0]]
            raise Race(
                f"thread {self._name(thread[i])} writes what several threads read, unordered"
            )
        if (reader == EVERYWHERE).any():
            i = np.flatnonzero(reader == EVERYWHERE)[0]
            raise Race(
                f"thread {self._name(thread[i])} writes what several CTAs read in this launch"
            )
        self.writer[at] = thread
        if not atomic and (self.writer[at] != thread).any():
            i = np.flatnonzero(self.writer[at] != thread)[0]
            pair = f"{self._name(thread[i])} and {self._name(self.writer[at[i]])}"
            raise Race(f"threads {pair} write the same bytes at once")
        self.written[at] = PENDING if pending else self.clocks.clock[thread]
        self.reader[at] = NOBODY
        self.atomic[at] = atomic

    def complete(self, at, thread):
        """The asynchronous write of these granules by these threads is done, as seen by them."""
        self.written[at] = self.clocks.clock[thread]

    def _require(self, at, thread, other, clock, doing, did):
        ok = self.clocks.ordered(thread, other, clock)
        if not ok.all():
            i = np.flatnonzero(~ok)[0]
            how = "copies there asynchronously" if clock[i] == PENDING else f"{did}, unordered"
            raise Race(
                f"thread {self._name(thread[i])} {doing} thread {self._name(other[i])} {how}"
            )

    def _after_all_readers(self, at, thread):
        mine = self.crowd[at] == thread // self.clocks.per
        return mine & (self.clocks.least[thread] >= self.read[at])

    def _name(self, thread):
        return f"{thread % self.clocks.per} of CTA {thread // self.clocks.per}"
