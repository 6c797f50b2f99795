"""Data races by vector clocks.

Every thread has a clock; known[c][i, j] is the latest clock of thread j of CTA c whose accesses
thread i of the same CTA is ordered after. Synchronising threads learn what each other knew. For
every 2 bytes of memory the last writer and the readers since are kept with their clocks; an access
that is not ordered after a conflicting one is a race, whether or not this run showed a wrong value.
Knowledge about other CTAs, rare, lives in `foreign`.

An asynchronous copy is a write by its thread whose clock is PENDING, which nobody is ordered after,
until the thread waits for it.

What the asynchronous proxy does (bulk copies, wgmma) belongs to no thread. Each warp's wgmma groups
and each mbarrier's phases are counted; progress[i, a] is how far thread i knows agent a to have
come. A bulk copy is a write by its mbarrier; a read by wgmma is known to be over once its group is.
The proxy itself sees only what a fence.proxy.async has shown it: visible[c][i, j] is the latest
clock of thread j whose accesses the proxy sees in what it does for thread i.
"""

import numpy as np

NOBODY, HOST, SEVERAL, EVERYWHERE = -1, -2, -3, -4  # in place of a thread number
AGENT = -16  # minus an agent's number: a write by bulk copies
MBARRIERS = 64  # of one CTA
UNIT = 8  # granules of what wgmma reads at once, 16 bytes
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
        self.warps = per // 32
        self.progress = np.zeros((ctas * per, self.warps + MBARRIERS), np.int32)
        self.visible = None  # until the first fence.proxy.async
        self.passed = None  # until the first meeting

    def synchronise(self, threads):
        """All of these threads of one CTA wait for each other: a barrier, or a warp-wide one."""
        cta, lanes = threads[0] // self.per, threads % self.per
        now = self.clock[threads].max()
        rows = self.known[cta, lanes].max(0)
        rows[lanes] = now
        self.known[cta, lanes] = rows
        self.least[threads] = rows.min()
        self.clock[threads] = now + 1
        self.progress[threads] = self.progress[threads].max(0)
        if self.visible is not None:
            self.visible[cta, lanes] = self.visible[cta, lanes].max(0)
        if self.passed is not None:
            self.passed[cta, lanes] = self.passed[cta, lanes].max(0)
        learned = [self.foreign[t] for t in threads if t in self.foreign] if self.foreign else []
        if learned:
            merged = np.maximum.reduce(learned)
            for t in threads:
                self.foreign[int(t)] = merged

    def meet(self, threads):
        """All of these threads of one CTA have come here before any goes on."""
        if self.passed is None:
            self.passed = np.zeros_like(self.known)
        cta, lanes = threads[0] // self.per, threads % self.per
        rows = self.passed[cta, lanes].max(0)
        rows[lanes] = self.clock[threads]
        self.passed[cta, lanes] = rows
        self.clock[threads] += 1

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

    # -- mbarriers: an arrival releases, a wait acquires --

    def release(self, threads):
        """What these threads of one CTA know: known, visible, progress, passed; two may be None."""
        cta, lanes = threads[0] // self.per, threads % self.per
        known = self.known[cta, lanes].max(0)
        known[lanes] = self.clock[threads]
        both = (self.visible, self.passed)
        visible, passed = (None if rows is None else rows[cta, lanes].max(0) for rows in both)
        message = known, visible, self.progress[threads].max(0), passed
        self.clock[threads] += 1
        return message

    def acquire(self, threads, message):
        cta, lanes = threads[0] // self.per, threads % self.per
        known, visible, progress, passed = message
        self.known[cta, lanes] = np.maximum(self.known[cta, lanes], known)
        self.least[threads] = self.known[cta, lanes].min(1)
        self.progress[threads] = np.maximum(self.progress[threads], progress)
        if visible is not None:
            self.visible[cta, lanes] = np.maximum(self.visible[cta, lanes], visible)
        if passed is not None:
            self.passed[cta, lanes] = np.maximum(self.passed[cta, lanes], passed)

    def proxy_fence(self, threads):
        """The asynchronous proxy now sees what these threads did or are ordered after."""
        if self.visible is None:
            self.visible = np.zeros_like(self.known)
        cta, lanes = threads // self.per, threads % self.per
        seen = np.maximum(self.visible[cta, lanes], self.known[cta, lanes])
        seen[np.arange(len(lanes)), lanes] = self.clock[threads]
        self.visible[cta, lanes] = seen
        self.clock[threads] += 1

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
        self.multiplied = None  # [unit, warp] the last wgmma group that reads it, once there is one

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
        self._require_landed(at, thread, writer, "reads")
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
        self._require_landed(at, thread, writer, "writes")
        self._require_multiplied(at, thread)
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

    # -- the asynchronous proxy --

    def on_bulk_write(self, at, thread, agent):
        """A bulk copy by this thread starts, which the agent will report; `landed` ends it."""
        who = np.full(len(at), thread)
        self._require_visible(at, [thread])
        self.on_write(at, who, pending=True)
        self.writer[at] = AGENT - agent

    def landed(self, at, phase):
        self.written[at] = phase

    def on_multiply(self, at, threads):
        """wgmma by these threads of one warpgroup reads; its group ends later."""
        writer = self.writer[at]
        self._require_visible(at, threads)
        late = writer <= AGENT
        if late.any():
            known = self.clocks.progress[threads].min(0)[AGENT - writer[late]]
            if (known < self.written[at[late]]).any():
                raise Race("wgmma reads what a bulk copy writes, without waiting for its mbarrier")

    def multiplied_by(self, at, warps, group):
        """The group of these warps of one CTA, by number for each, reads these granules."""
        if self.multiplied is None:
            units = -(-len(self.writer) // UNIT)
            self.multiplied = np.zeros((units, self.clocks.warps), np.int32)
        self.multiplied[np.unique(at // UNIT)[:, None], warps] = group

    def _require_visible(self, at, threads):
        """What threads wrote there (as others see it), the asynchronous proxy must see too."""
        writer, written = self.writer[at], self.written[at]
        check = writer >= 0
        if not check.any():
            return
        clocks, threads = self.clocks, np.asarray(threads)
        cta, lanes = threads[0] // clocks.per, threads % clocks.per
        other = writer[check] % clocks.per
        ordered = written[check] <= clocks.known[cta, lanes].min(0)[other]
        if len(threads) == 1:  # its own
            ordered |= (writer[check] == threads[0]) & (written[check] != PENDING)
        shown = np.zeros_like(ordered)
        if clocks.visible is not None:
            shown = written[check] <= clocks.visible[cta, lanes].min(0)[other]
        if not shown.all():
            i = np.flatnonzero(~shown)[0]
            why = "no fence.proxy.async lies between" if ordered[i] else "unordered"
            name = self._name(writer[check][i])
            raise Race(f"the asynchronous proxy touches what thread {name} wrote: {why}")

    def _require_landed(self, at, thread, writer, doing):
        late = writer <= AGENT
        if late.any():
            known = self.clocks.progress[thread[late], AGENT - writer[late]]
            if (bad := known < self.written[at[late]]).any():
                name = self._name(thread[late][np.flatnonzero(bad)[0]])
                raise Race(f"thread {name} {doing} where a bulk copy writes, not waiting for it")

    def _require_multiplied(self, at, thread):
        if self.multiplied is None:
            return
        groups = self.multiplied[at // UNIT]
        if (bad := groups > self.clocks.progress[thread, : self.clocks.warps]).any():
            name = self._name(thread[np.flatnonzero(bad.any(1))[0]])
            raise Race(f"thread {name} writes what a wgmma in flight may read")

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
