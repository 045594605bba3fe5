package trainer

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"trainerd/rollout/spool"
)

func TestDirectoriesWithoutAJob(t *testing.T) {
	data := t.TempDir()
	m := &Manager{opts: Options{DataDir: data}, limits: Limits{}.withDefaults(), log: slog.New(slog.DiscardHandler), jobs: map[JobID]*Job{}}
	known := newJobID()
	m.jobs[known] = &Job{ID: known}
	stays := map[JobID]bool{known: true}
	for _, c := range []struct {
		records int
		beside  string // besides the log
		stays   bool
	}{{0, "", false}, {1, "", true}, {0, "ended.bin", true}} {
		id := newJobID()
		stays[id] = c.stays
		log, err := spool.Open(filepath.Join(m.jobDir(id), "spool"), 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		for range c.records {
			if _, err := log.Append(spool.Record{Kind: recordRollouts}); err != nil {
				t.Fatal(err)
			}
		}
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		if c.beside != "" {
			if err := os.WriteFile(filepath.Join(m.jobDir(id), c.beside), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	bare := newJobID()
	stays[bare] = false
	for _, dir := range []string{m.jobDir(known), m.jobDir(bare), filepath.Join(data, "jobs", "somebody's")} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	stays["somebody's"] = true
	if err := m.sweepUnrecorded(); err != nil {
		t.Fatal(err)
	}
	for id, want := range stays {
		if _, err := os.Stat(m.jobDir(id)); (err == nil) != want {
			t.Errorf("%s: %v, expected it to stay: %v", id, err, want)
		}
	}
}
