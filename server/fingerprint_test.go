package server_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"trainerd/client"
	"trainerd/kernels"
	"trainerd/server/servertest"
)

// disguised is a device under another fingerprint.
type disguised struct {
	kernels.Device
	kernels.Scratcher
	print kernels.Fingerprint
}

func (d *disguised) Fingerprint() kernels.Fingerprint { return d.print }

// lockedBuffer is a log that tests read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestFingerprint: job and checkpoints say what their bits were computed by, and
// a restart by something else is recorded once, with what changed and after which step.
func TestFingerprint(t *testing.T) {
	const n = 3
	var log lockedBuffer
	is := kernels.Fingerprint{Device: "cuda", Card: "H100", Driver: "13.0", CublasLt: "13.1.0", Algorithms: "timed", Choices: map[string]string{"a": "1", "b": "2"}}
	e := servertest.Start(t, servertest.Options{
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
		WrapDevice: func(d kernels.Device) kernels.Device {
			return &disguised{Device: d, Scratcher: d.(kernels.Scratcher), print: is}
		},
	})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(n, map[string]any{"checkpoint": map[string]any{"snapshot_every_steps": 1, "keep_last": 0}}))
	feed(t, c, ctx, j.ID, n, 0, 1, 1)
	at := func(step int64) func(client.Job) bool {
		return func(j client.Job) bool { return j.PolicyStep == step && j.State == "waiting" }
	}
	j = await(t, c, ctx, j.ID, "step 1", at(1))
	if f := j.Fingerprint; f == nil || f.Engine != "test" || f.Device != "cuda" || f.Card != "H100" || f.Choices != 2 || f.ChoicesSHA256 != is.ChoicesSHA256() || len(j.FingerprintChanges) != 0 {
		t.Fatalf("the job says %+v, changes %+v", f, j.FingerprintChanges)
	}
	man, err := c.Checkpoint(ctx, j.ID, 1)
	if err != nil {
		t.Fatal(err)
	}
	said, _ := man.Extra["fingerprint"].(map[string]any)
	if said["card"] != "H100" || said["algorithms"] != "timed" || said["choices_sha256"] != is.ChoicesSHA256() {
		t.Errorf("the manifest says %v", man.Extra)
	}
	if _, ok := said["instructions"]; ok {
		t.Errorf("the manifest says what the device does not have: %v", said)
	}

	restart := func(step int64) client.Job {
		t.Helper()
		e.Stop()
		e.Boot(t)
		c, ctx = connect(t, e)
		return await(t, c, ctx, j.ID, "the restored job", at(step))
	}
	const warning = "computed by something else"
	is.Choices = map[string]string{"a": "1", "b": "2", "c": "3"} // another product was met before the stop
	if j = restart(1); len(j.FingerprintChanges) != 0 || strings.Contains(log.String(), warning) {
		t.Errorf("a choice that was added is a change: %+v", j.FingerprintChanges)
	}
	feed(t, c, ctx, j.ID, n, 1, 2, 1)
	await(t, c, ctx, j.ID, "step 2", at(2))

	is.CublasLt, is.Choices = "13.2.0", map[string]string{"a": "1", "b": "9"}
	for range 2 { // the second restart changes nothing any more
		j = restart(2)
		if len(j.FingerprintChanges) != 1 || j.FingerprintChanges[0].AfterStep != 2 || j.FingerprintChanges[0].Time.IsZero() {
			t.Fatalf("changes %+v", j.FingerprintChanges)
		}
		raw, err := json.Marshal(j.FingerprintChanges[0].Changes)
		if err != nil {
			t.Fatal(err)
		}
		const want = `[{"name":"cublaslt","was":"13.1.0","is":"13.2.0"},{"name":"choices: b","was":"2","is":"9"},{"name":"choices: c","was":"3","is":""}]`
		if string(raw) != want {
			t.Errorf("changes %s, expected %s", raw, want)
		}
	}
	if got := strings.Count(log.String(), warning); got != 1 {
		t.Errorf("%d warnings, expected 1", got)
	}

	// A record of a version that knew no fingerprints takes the first it sees.
	e.Stop()
	forget(t, filepath.Join(e.DataDir, "trainerd.db"))
	e.Boot(t)
	c, ctx = connect(t, e)
	j = await(t, c, ctx, j.ID, "the job of an older version", at(2))
	if j.Fingerprint == nil || j.Fingerprint.CublasLt != "13.2.0" || len(j.FingerprintChanges) != 0 {
		t.Errorf("a record without a fingerprint becomes %+v with changes %+v", j.Fingerprint, j.FingerprintChanges)
	}
}

// forget takes the fingerprints out of the records of jobs.
func forget(t *testing.T, file string) {
	t.Helper()
	db, err := bbolt.Open(file, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("jobs"))
		return b.ForEach(func(k, v []byte) error {
			var rec map[string]json.RawMessage
			if err := json.Unmarshal(v, &rec); err != nil {
				return err
			}
			if rec["fingerprint"] == nil || rec["fingerprint_changes"] == nil {
				t.Errorf("the record holds no fingerprint: %s", v)
			}
			delete(rec, "fingerprint")
			delete(rec, "fingerprint_changes")
			raw, err := json.Marshal(rec)
			if err != nil {
				return err
			}
			return b.Put(k, raw)
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestFingerprintOfDevice: the real device says its instruction set and nothing of a card.
func TestFingerprintOfDevice(t *testing.T) {
	e := servertest.Start(t, servertest.Options{})
	c, ctx := connect(t, e)
	j := create(t, c, ctx, e.JobDocument(3, nil))
	j = await(t, c, ctx, j.ID, "the model", func(j client.Job) bool { return j.State == "waiting" })
	f := j.Fingerprint
	if f == nil || f.Device != "cpu" && f.Device != "cuda" || (f.Device == "cpu") != (f.Instructions != "") || (f.Device == "cuda") != (f.CublasLt != "") {
		t.Errorf("the device is %+v", f)
	}
}
