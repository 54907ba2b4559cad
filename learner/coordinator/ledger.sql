-- The ledger of one run. Written by learner/coordinator/tables.py.
-- Invariant: tallies['accepted'] = count(*) of trajectories, each in exactly one state; the other tallies equal
-- what they count.

CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE sessions (
    session_id TEXT PRIMARY KEY,
    actor_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0,   -- sequence of the last item decided upon
    closed TEXT                                -- why it ended; null while live
) WITHOUT ROWID;

CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,
    environment TEXT NOT NULL,
    split TEXT NOT NULL,
    task_index INTEGER NOT NULL,
    seed TEXT NOT NULL,                        -- 64 bits, unsigned
    born_epoch INTEGER NOT NULL,
    born_step INTEGER NOT NULL,
    num_slots INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'open',        -- open, assigned, trained, dropped
    step INTEGER,                              -- the step that trains or trained it
    reason TEXT
);
CREATE INDEX groups_by_state ON groups (state, step);

CREATE TABLE leases (
    lease_id TEXT PRIMARY KEY,
    group_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    outcome TEXT,                              -- null while live
    message TEXT
) WITHOUT ROWID;
CREATE INDEX leases_by_group ON leases (group_id);

CREATE TABLE trajectories (
    trajectory_id TEXT PRIMARY KEY,
    lease_id TEXT NOT NULL,
    group_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    state TEXT NOT NULL,
    environment TEXT NOT NULL,
    oldest_step INTEGER NOT NULL,
    num_sampled INTEGER NOT NULL,
    mixed INTEGER NOT NULL,
    reward REAL NOT NULL,
    observation_digest TEXT NOT NULL,
    step INTEGER,                              -- the step that trained it
    lag INTEGER                                -- step minus oldest_step, at least 0
);
CREATE INDEX trajectories_by_group ON trajectories (group_id);
CREATE INDEX trajectories_by_state ON trajectories (state);

CREATE TABLE payloads (
    trajectory_id TEXT PRIMARY KEY,
    payload BLOB NOT NULL,
    checksum INTEGER NOT NULL                  -- XXH3 of the payload, as signed 64 bits
);

CREATE TABLE partials (                        -- handed over by leaving actors, of open groups
    group_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    newest_epoch INTEGER NOT NULL,             -- the newest version among its tokens
    newest_step INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,               -- sampled
    payload BLOB NOT NULL,                     -- a Partial
    checksum INTEGER NOT NULL,
    PRIMARY KEY (group_id, slot)
) WITHOUT ROWID;

CREATE TABLE lineages (
    epoch INTEGER PRIMARY KEY,
    step INTEGER NOT NULL,                     -- of the checkpoint that it started from
    max_lag INTEGER NOT NULL
);

CREATE TABLE versions (
    epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    digest TEXT NOT NULL,
    manifest BLOB NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (epoch, step)
) WITHOUT ROWID;

CREATE TABLE checkpoints (
    epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    path TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (epoch, step)
) WITHOUT ROWID;

CREATE TABLE tallies (
    name TEXT PRIMARY KEY,                     -- accepted, duplicate, rejected:CODE, state:STATE, ...
    value INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TABLE events (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL
);
