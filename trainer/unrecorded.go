package trainer

import (
	"fmt"
	"os"
	"path/filepath"

	"trainerd/rollout/spool"
)

// sweepUnrecorded removes the directories of jobs that a crash took before they
// were recorded: nobody was told their ids, and their logs are empty. A directory
// without a record whose log holds something belongs to a database that is not
// here; it is left alone and named.
func (m *Manager) sweepUnrecorded() error {
	dir := filepath.Join(m.opts.DataDir, "jobs")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look for directories without a job: %w", err)
	}
	for _, e := range entries {
		id := JobID(e.Name())
		if m.jobs[id] != nil || !e.IsDir() || !validJobID(e.Name()) {
			continue
		}
		empty, err := m.emptyLog(id)
		if err == nil && empty {
			err = os.RemoveAll(m.jobDir(id))
		}
		switch {
		case err != nil:
			m.log.Warn("look at a directory without a job", "dir", m.jobDir(id), "err", err)
		case !empty:
			m.log.Warn("a directory holds rollouts of a job that is not recorded: it is left alone", "dir", m.jobDir(id))
		}
	}
	return nil
}

// emptyLog says that no batch was ever accepted into a job's directory.
func (m *Manager) emptyLog(id JobID) (bool, error) {
	entries, err := os.ReadDir(m.jobDir(id))
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if e.Name() != "spool" {
			return false, nil
		}
	}
	if len(entries) == 0 {
		return true, nil
	}
	log, err := spool.Open(filepath.Join(m.jobDir(id), "spool"), m.limits.SegmentBytes)
	if err != nil {
		return false, err
	}
	return log.Last() == 0, log.Close()
}
