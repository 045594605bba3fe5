package trainer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"trainerd/internal/crashpoint"
	"trainerd/internal/durable"
	"trainerd/internal/fault"
	"trainerd/rollout/spool"
)

// An ended job keeps what its API still answers (the fate of its batches, its
// counts and idempotency keys) in one file in its directory, in the format of a
// snapshot's queue. Its spool and pulled model are given up once the file is durable.
const (
	fileEnded   = "ended.bin"
	partialMark = ".partial"
)

// retire brings a job whose end is recorded to that state, from wherever a crash left it, and
// makes what it was known again after a restart. What the store does not answer
// is asked again until the manager closes. Its model is left alone.
func (j *Job) retire() {
	j.mu.Lock()
	ends := j.ends
	j.mu.Unlock()
	if !ends {
		return
	}
	for pause := retryFirst; ; pause = min(2*pause, retryMost) {
		err := j.m.untilClosed(context.Background(), j.settleEnd)
		switch {
		case err == nil, errors.Is(err, errClosed):
			return
		case fault.KindOf(err) != fault.Unavailable:
			// What is damaged stays as it is, for somebody to look at.
			j.m.log.Error("read what an ended job left", "job", j.ID, "err", err)
			j.known()
			return
		}
		j.m.log.Warn("settle an ended job: it is tried again", "job", j.ID, "err", err)
		select {
		case <-time.After(pause):
		case <-j.m.closed:
			return
		}
	}
}

// settleEnd is one try of retire.
func (j *Job) settleEnd(ctx context.Context) error {
	j.mu.Lock()
	known, latest := j.fed, j.latest
	j.mu.Unlock()
	if !known {
		done, err := j.readEnded()
		if err != nil {
			return err
		}
		if done {
			_, err = j.findSnapshot(ctx) // for the newest checkpoint
			j.known()
			return errors.Join(err, j.reclaim())
		}
		if err := j.recall(ctx); err != nil {
			return err
		}
		j.known()
	} else if latest == nil {
		if _, err := j.findSnapshot(ctx); err != nil {
			return err
		}
	}
	j.mu.Lock()
	q := j.queueState()
	j.mu.Unlock()
	if err := j.writeEnded(q); err != nil {
		return &fault.Error{Kind: fault.Unavailable, Code: "ended_unavailable", Msg: "write " + fileEnded, Err: err}
	}
	return j.reclaim()
}

// known says that the queue has all that the job ever took.
func (j *Job) known() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.fed, j.returning = true, false
}

// recall rebuilds the queue of a job whose end was recorded and whose file was
// not written. Nothing is repeated on the device.
func (j *Job) recall(ctx context.Context) error {
	snap, err := j.findSnapshot(ctx)
	if err != nil {
		return err
	}
	q, err := j.resume(ctx, snap)
	if err != nil {
		return err
	}
	return j.rebuild(ctx, snap, q)
}

// writeEnded makes the file durable.
func (j *Job) writeEnded(q *queueState) error {
	defer crashpoint.Enter(crashpoint.Record)()
	dir := j.m.jobDir(j.ID)
	f, err := os.Create(filepath.Join(dir, fileEnded+partialMark))
	if err != nil {
		return err
	}
	err = q.encode(f)
	crashpoint.Reach("ended.written")
	if err == nil {
		err = crashpoint.Sync("ended.file", f)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, fileEnded)); err != nil {
		return err
	}
	err = durable.SyncDir("ended.name", dir)
	crashpoint.Reach("ended.recorded")
	return err
}

// readEnded reads the file; false when there is none.
func (j *Job) readEnded() (bool, error) {
	path := filepath.Join(j.m.jobDir(j.ID), fileEnded)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close() // was only read
	q, err := decodeQueue(f)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", path, err)
	}
	if q.job != j.ID {
		return false, fault.New(fault.Internal, "queue_state", "read %s: it is of job %s", path, q.job)
	}
	return true, j.enterQueue(q)
}

// reclaim removes what an ended job needs no longer. It may be interrupted anywhere.
func (j *Job) reclaim() error {
	defer crashpoint.Enter(crashpoint.Retain)()
	dir := j.m.jobDir(j.ID)
	entries, err := os.ReadDir(dir)
	err = errors.Join(err, j.closeLog())
	for _, prefix := range []string{"spool", "base", "snapshot", fileEnded + partialMark} {
		crashpoint.Reach("ended.reclaim")
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), prefix) {
				err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
	}
	return err
}

// openLog opens the job's spool unless it is open. Called by the job's goroutine, or before there is one.
func (j *Job) openLog() error {
	if j.spool != nil {
		return nil
	}
	log, err := spool.Open(filepath.Join(j.m.jobDir(j.ID), "spool"), j.m.limits.SegmentBytes)
	if err != nil {
		return fmt.Errorf("open spool of job %s: %w", j.ID, err)
	}
	if f := j.m.opts.BeforeSync; f != nil {
		log.BeforeSync(f)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.spool = log
	return nil
}

// closeLog closes the job's spool if it is open.
func (j *Job) closeLog() error {
	j.mu.Lock()
	log := j.spool
	j.mu.Unlock()
	if log == nil {
		return nil
	}
	return log.Close()
}
