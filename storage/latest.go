package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"trainerd/internal/fault"
)

// latest is the content of latest.json.
type latest struct {
	Step    int64  `json:"step"`
	Attempt int    `json:"attempt"`
	Prefix  string `json:"prefix"`
	SHA256  string `json:"manifest_sha256"`
}

const maxLatest = 4 << 10

// casRounds bounds how often latest.json is tried: every lost round is another
// committer's success, so that this many concurrent commits of one job can go on.
const casRounds = 100

// errBadLatest marks a latest.json that cannot be read; the manifests still can.
var errBadLatest = errors.New("latest.json is damaged")

// readLatest reads a job's latest.json. With errBadLatest the ETag is valid all the same.
func (c Checkpoints) readLatest(ctx context.Context, job string) (latest, string, error) {
	data, info, err := readSmall(ctx, c.Blob, latestKey(job), maxLatest)
	if err != nil {
		if fault.KindOf(err) == fault.TooLarge {
			err = fmt.Errorf("%w: %w", errBadLatest, err)
		}
		return latest{}, info.ETag, err
	}
	l, err := decodeLatest(data, job)
	if err != nil {
		err = fmt.Errorf("%w: %w", errBadLatest, err)
	}
	return l, info.ETag, err
}

func decodeLatest(data []byte, job string) (latest, error) {
	var l latest
	if err := decodeStrict(data, maxLatest, "latest.json", &l); err != nil {
		return latest{}, err
	}
	if l.Step < 0 || l.Attempt < 0 || l.Prefix != prefixOf(job, l.Step, l.Attempt) || len(l.SHA256) != 64 {
		return latest{}, fault.New(fault.Malformed, "bad_latest.json", "decode latest.json: members contradict each other")
	}
	return l, nil
}

// Promote makes latest.json name m unless it already names a checkpoint as new
// or newer, by step and then attempt. Commit ends with it; after a crash it
// mends a latest.json that stayed behind.
func (c Checkpoints) Promote(ctx context.Context, m Manifest) error {
	_, raw, err := c.manifest(ctx, m.Job, m.Step, m.Attempt)
	if err != nil {
		return fmt.Errorf("promote checkpoint %s: %w", m.Prefix, err)
	}
	return c.moveLatest(ctx, m, raw)
}

func (c Checkpoints) moveLatest(ctx context.Context, m Manifest, raw []byte) error {
	next, err := json.Marshal(latest{Step: m.Step, Attempt: m.Attempt, Prefix: m.Prefix, SHA256: hexSHA256(raw)})
	if err != nil {
		return fmt.Errorf("encode latest.json: %w", err)
	}
	next = append(next, '\n')
	for round := range casRounds {
		if round > 0 {
			// Full jitter keeps committers that lost together from losing together again.
			wait := time.Duration(rand.Int64N(int64(time.Millisecond) << min(round, 8)))
			if err := sleep(ctx, wait); err != nil {
				return fmt.Errorf("move latest.json of job %s: %w", m.Job, err)
			}
		}
		now, etag, err := c.readLatest(ctx, m.Job)
		cond := Condition{IfMatch: etag}
		switch {
		case err == nil && !m.newer(now.Step, now.Attempt):
			return nil
		case errors.Is(err, ErrNotFound), errors.Is(err, errBadLatest):
			// What readers were shown meanwhile is the newest whole checkpoint, so only that may take its place.
			if errors.Is(err, ErrNotFound) {
				cond = Condition{IfAbsent: true}
			}
			newest, err := c.newestWhole(ctx, m.Job)
			if err != nil {
				return fmt.Errorf("mend latest.json of job %s: %w", m.Job, err)
			}
			if newest.newer(m.Step, m.Attempt) {
				return c.Promote(ctx, newest)
			}
		case err != nil:
			return fmt.Errorf("read latest.json of job %s: %w", m.Job, err)
		}
		_, err = c.Blob.Put(ctx, latestKey(m.Job), bytes.NewReader(next), int64(len(next)), cond)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrPrecondition) {
			return fmt.Errorf("move latest.json of job %s: %w", m.Job, err)
		}
	}
	return fault.New(fault.Busy, "latest_contended", "move latest.json of job %s: lost %d compare-and-swaps in a row", m.Job, casRounds)
}

// sleep waits for d or for the context's end.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
