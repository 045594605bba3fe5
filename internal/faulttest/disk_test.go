//go:build faults

package faulttest

import (
	"context"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// diskSays waits until a worker, /readyz, the job and the metrics say that the
// data directory's disk is full.
func (w *world) diskSays(since time.Time) {
	w.t.Helper()
	told := w.refused("disk_full")
	w.await("the worker is told", 30*time.Second, func() bool { return w.refused("disk_full") > told })
	w.await("/readyz says so", 30*time.Second, func() bool {
		status, code, detail := w.ready()
		return status == http.StatusServiceUnavailable && code == "disk_full" && strings.Contains(detail, "the disk of the data directory is full")
	})
	w.await("the job says so", 30*time.Second, func() bool {
		e := w.status().LastError
		return e != nil && e.Code == "disk_full" && e.Time.After(since) && strings.Contains(e.Message, "no space left on device")
	})
	w.await("the metrics say so", 30*time.Second, func() bool {
		return w.metric("trainerd_data_disk_failing") == 1 && w.metric("trainerd_data_disk_errors_total") > 0 && w.failing("disk_full")
	})
}

// TestDataDiskFull fills the disk of the spool and the database, not the store's.
func TestDataDiskFull(t *testing.T) {
	t.Parallel()
	data := smallDisk(t, 16)
	w := newWorld(t, options{data: data, store: []string{"--store", "dir:" + t.TempDir()}})
	w.healthy()
	since := time.Now()
	free := fillDisk(t, data)
	w.diskSays(since)
	accepted := w.batches()
	time.Sleep(3 * time.Second)
	if n := w.batches(); n != accepted {
		t.Errorf("%d batches were accepted on a full disk", n-accepted)
	}
	free()
	w.recovers(recovery, "disk_full")
	if w.metric("trainerd_data_disk_failing") != 0 {
		t.Error("the disk still counts as failing")
	}
	w.finish()
}

// TestDataDiskFullDuringSteps has a queue of work when the disk is full, so that
// it is the record of a step that fails.
func TestDataDiskFullDuringSteps(t *testing.T) {
	t.Parallel()
	data := smallDisk(t, 16)
	w := newWorld(t, options{data: data, store: []string{"--store", "dir:" + t.TempDir()}, pace: 5 * time.Millisecond})
	w.healthy()
	if _, err := w.client.Pause(context.Background(), w.job); err != nil {
		t.Fatal(err)
	}
	at := w.batches()
	w.await("a queue of 120 batches", time.Minute, func() bool { return w.batches() >= at+120 })
	since := time.Now()
	free := fillDisk(t, data)
	w.await("the worker is told", 30*time.Second, func() bool { return w.refused("disk_full") > 0 })
	// What resumes the job is a record as well: it may be refused at first.
	w.await("steps are not recorded", 30*time.Second, func() bool {
		w.client.Resume(context.Background(), w.job)
		e := w.status().LastError
		return e != nil && e.Time.After(since) && e.Code == "disk_full" && strings.Contains(e.Message, "record step")
	})
	step := w.status().Step
	w.diskSays(since)
	time.Sleep(2 * time.Second)
	if j := w.status(); j.Step != step || j.Final() {
		t.Errorf("the job is %s at step %d, expected it to wait at %d", j.State, j.Step, step)
	}
	free()
	w.await("resumed", recovery, func() bool { _, err := w.client.Resume(context.Background(), w.job); return err == nil })
	w.recovers(recovery, "disk_full")
	w.finish()
}

// TestOneDiskForAll has spool, database and checkpoints on the disk that is full.
func TestOneDiskForAll(t *testing.T) {
	t.Parallel()
	data := smallDisk(t, 24)
	w := newWorld(t, options{data: data})
	w.healthy()
	since := time.Now()
	free := fillDisk(t, data)
	w.diskSays(since)
	free()
	w.recovers(recovery, "disk_full", "publish_failed")
	w.finish()
	wholeDirectory(t, data+"/store")
}

// TestFullDiskAtStart restarts a server on the disk that stopped it: it starts,
// says what is wrong, and goes on once there is space.
func TestFullDiskAtStart(t *testing.T) {
	t.Parallel()
	data := smallDisk(t, 24)
	w := newWorld(t, options{data: data})
	w.healthy()
	since := time.Now()
	free := fillDisk(t, data)
	w.diskSays(since)
	w.restart()
	w.diskSays(since)
	free()
	w.recovers(recovery, "disk_full", "publish_failed")
	w.finish()
	if left, err := os.ReadDir(data); err != nil {
		t.Error(err)
	} else {
		for _, e := range left {
			if strings.HasPrefix(e.Name(), ".probe") {
				t.Errorf("%s was left behind", e.Name())
			}
		}
	}
}
