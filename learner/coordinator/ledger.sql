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
    group_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    outcome TEXT,                              -- null while live
    message TEXT,
    PRIMARY KEY (group_id, slot, attempt)
) WITHOUT ROWID;

CREATE TABLE trajectories (
    trajectory_id TEXT NOT NULL,               -- no two rows have the same
    group_id INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    attempt INTEGER NOT NULL,                  -- of the lease that it came under
    session_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    state TEXT NOT NULL,
    environment TEXT NOT NULL,
    oldest_step INTEGER NOT NULL,
    num_sampled INTEGER NOT NULL,
    mixed INTEGER NOT NULL,
    reward REAL NOT NULL,
    observation_digest TEXT NOT NULL,
    segment INTEGER,                           -- where its payload lies; null where it isn't needed (any more)
    offset INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    checksum INTEGER NOT NULL,                 -- XXH3 of the payload, as signed 64 bits
    step INTEGER,                              -- the step that trained it
    lag INTEGER,                               -- step minus oldest_step, at least 0
    PRIMARY KEY (group_id, slot, trajectory_id)
) WITHOUT ROWID;

-- A trajectory ends the lease that it came under, unless that had ended.
CREATE TRIGGER filled AFTER INSERT ON trajectories BEGIN
    UPDATE leases SET outcome = 'filled'
    WHERE group_id = new.group_id AND slot = new.slot AND attempt = new.attempt AND outcome IS NULL;
END;

CREATE TABLE segments (                        -- files of payloads, see segments.py
    number INTEGER PRIMARY KEY,
    num_payloads INTEGER NOT NULL              -- that trajectories name; at 0 the file goes
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

-- Evaluations: answers that never train, and are no trajectories of the tables above.
CREATE TABLE evaluations (
    number INTEGER PRIMARY KEY,
    epoch INTEGER NOT NULL,                    -- with step, the one version that every token must be of
    step INTEGER NOT NULL,
    digest TEXT NOT NULL,
    num_slots INTEGER NOT NULL,
    plan TEXT NOT NULL,                        -- JSON: what is asked
    time REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'open',        -- open, complete, deadline, void
    reason TEXT,
    result TEXT                                -- JSON, once it is complete or at its deadline
);

CREATE TABLE evaluation_leases (
    number INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    outcome TEXT,                              -- null while live
    message TEXT,
    PRIMARY KEY (number, slot, attempt)
) WITHOUT ROWID;

CREATE TABLE evaluation_answers (
    trajectory_id TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    state TEXT NOT NULL,                       -- counted: one a slot at most; surplus
    environment TEXT NOT NULL,
    task_index INTEGER NOT NULL,
    versions TEXT NOT NULL,                    -- JSON: [[epoch, step, tokens], ...] as its tokens were labelled
    num_sampled INTEGER NOT NULL,
    reward REAL NOT NULL,
    truncated INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX evaluation_answers_by_slot ON evaluation_answers (number, slot);

-- An answer ends the lease that it came under, unless that had ended.
CREATE TRIGGER answered AFTER INSERT ON evaluation_answers BEGIN
    UPDATE evaluation_leases SET outcome = 'filled'
    WHERE number = new.number AND slot = new.slot AND attempt = new.attempt AND outcome IS NULL;
END;
