package storage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"trainerd/internal/crashpoint"
	"trainerd/internal/fault"
)

// Delete removes a checkpoint, its manifest first: no reader ever finds a
// manifest whose files are going. The one that latest.json names is refused.
// A crash in between leaves files that Sweep removes; the claim stays.
//
// Who may delete what (keep last N, every K-th, leases) is the caller's policy.
func (c Checkpoints) Delete(ctx context.Context, m Manifest) error {
	if err := m.Validate(); err != nil {
		return err
	}
	now, _, err := c.readLatest(ctx, m.Job)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("delete checkpoint %s: %w", m.Prefix, err)
	}
	// Without latest.json readers fall back to the newest whole one: that is refused as well.
	if err != nil {
		newest, err := c.newestWhole(ctx, m.Job)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return fmt.Errorf("delete checkpoint %s: %w", m.Prefix, err)
		}
		now.Prefix = newest.Prefix
	}
	if now.Prefix == m.Prefix {
		return fault.New(fault.Conflict, "checkpoint_is_latest", "delete checkpoint %s: it is the latest of job %s", m.Prefix, m.Job)
	}
	crashpoint.Reach("retain.before_manifest")
	if err := c.Blob.Delete(ctx, m.Prefix+"/"+manifestName); err != nil {
		return fmt.Errorf("delete checkpoint %s: %w", m.Prefix, err)
	}
	crashpoint.Reach("retain.before_files")
	if _, err := c.seal(ctx, m.Prefix, claimDeleted); err != nil {
		return fmt.Errorf("delete checkpoint %s: %w", m.Prefix, err)
	}
	if err := c.removeData(ctx, m.Prefix); err != nil {
		return fmt.Errorf("delete checkpoint %s: %w", m.Prefix, err)
	}
	return nil
}

// Sweep removes the data of a job's prefixes that have no manifest and whose
// newest object is older than age, and returns the prefixes. The age is
// measured between the store's clock and this machine's; let it be hours, far
// more than the longest upload of one file takes. A writer that comes back
// after its prefix was swept cannot commit.
func (c Checkpoints) Sweep(ctx context.Context, job string, age time.Duration) ([]string, error) {
	if err := CheckJob(job); err != nil {
		return nil, err
	}
	stale, err := c.stale(ctx, job, time.Now().Add(-age))
	if err != nil {
		return nil, fmt.Errorf("sweep job %s: %w", job, err)
	}
	var swept []string
	for _, prefix := range stale {
		won, err := c.seal(ctx, prefix, claimSwept)
		if err != nil {
			return swept, fmt.Errorf("sweep %s: %w", prefix, err)
		}
		if !won {
			continue // its writer is alive
		}
		// Sealed before this look: a manifest that is there now was there in time, one that is not never comes.
		_, err = c.Blob.Stat(ctx, prefix+"/"+manifestName)
		if err == nil {
			continue
		}
		if !errors.Is(err, ErrNotFound) {
			return swept, fmt.Errorf("sweep %s: %w", prefix, err)
		}
		if err := c.removeData(ctx, prefix); err != nil {
			return swept, fmt.Errorf("sweep %s: %w", prefix, err)
		}
		swept = append(swept, prefix)
	}
	return swept, nil
}

// stale lists the prefixes with data, without manifest, and untouched since before.
func (c Checkpoints) stale(ctx context.Context, job string, before time.Time) ([]string, error) {
	type state struct {
		data, whole bool
		newest      time.Time
	}
	prefixes := map[string]*state{}
	err := c.Blob.List(ctx, checkpointsOf(job), func(o Info) error {
		dir, name, _ := strings.Cut(strings.TrimPrefix(o.Key, checkpointsOf(job)), "/")
		if _, _, ok := parsePrefix(dir); !ok {
			return nil // not ours
		}
		s := prefixes[dir]
		if s == nil {
			s = &state{}
			prefixes[dir] = s
		}
		s.whole = s.whole || name == manifestName
		s.data = s.data || name != claimName
		if o.Modified.After(s.newest) {
			s.newest = o.Modified
		}
		return nil
	})
	var found []string
	for dir, s := range prefixes {
		if s.data && !s.whole && s.newest.Before(before) {
			found = append(found, checkpointsOf(job)+dir)
		}
	}
	slices.Sort(found)
	return found, err
}

// seal takes a prefix's claim away from its writer; false when the writer moved it first.
func (c Checkpoints) seal(ctx context.Context, prefix, state string) (bool, error) {
	h := heldClaim{key: prefix + "/" + claimName, owner: nonce()}
	_, etag, err := c.readClaim(ctx, h.key)
	cond := Condition{IfMatch: etag}
	switch {
	case errors.Is(err, ErrNotFound):
		cond = Condition{IfAbsent: true}
	case err != nil && etag == "":
		return false, err
	}
	err = c.putClaim(ctx, &h, state, cond)
	if errors.Is(err, ErrPrecondition) {
		return false, nil
	}
	return err == nil, err
}

// removeData deletes everything under a prefix but its claim.
func (c Checkpoints) removeData(ctx context.Context, prefix string) error {
	var keys []string
	err := c.Blob.List(ctx, prefix+"/", func(o Info) error {
		if o.Key != prefix+"/"+claimName {
			keys = append(keys, o.Key)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := c.Blob.Delete(ctx, key); err != nil {
			return err
		}
	}
	return nil
}
