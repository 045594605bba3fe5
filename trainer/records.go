package trainer

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"trainerd/internal/crashpoint"
	"trainerd/internal/durable"
	"trainerd/internal/fault"
	"trainerd/model"
)

// JobID names a job for ever: in the API, the data directory and the store.
type JobID string

func newJobID() JobID {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // the system has no entropy: nothing can be named
	}
	return JobID("job-" + hex.EncodeToString(b[:]))
}

func validJobID(s string) bool {
	if len(s) != len("job-")+16 || s[:4] != "job-" {
		return false
	}
	_, err := hex.DecodeString(s[4:])
	return err == nil
}

// State is where a job is in its life.
type State string

// The states of a job. Finished, failed and cancelled are final.
const (
	Loading   State = "loading"
	Waiting   State = "waiting"
	Training  State = "training"
	Paused    State = "paused"
	Finished  State = "finished"
	Failed    State = "failed"
	Cancelled State = "cancelled"
)

// Final reports whether a job in this state never trains again.
func (s State) Final() bool { return s == Finished || s == Failed || s == Cancelled }

// LastError is the newest thing that went wrong with a job.
type LastError struct {
	Code    string        `json:"code"`
	Message string        `json:"message"`
	Fields  []fault.Field `json:"fields,omitempty"`
	Time    time.Time     `json:"time"`
}

func lastError(err error) *LastError {
	le := &LastError{Code: "internal", Message: err.Error(), Time: time.Now().UTC()}
	if f, ok := fault.As(err); ok {
		le.Fields = f.Fields
		le.Code = f.Code
		if le.Code == "" {
			le.Code = f.Kind.String()
		}
	}
	return le
}

// jobRecord is what the database keeps of a job.
type jobRecord struct {
	ID        JobID        `json:"id"`
	Created   time.Time    `json:"created"`
	Spec      Spec         `json:"spec"`
	Source    string       `json:"source"` // Spec.Model.Source with "latest" resolved
	Model     model.Config `json:"model"`  // zero until the source was opened
	DType     string       `json:"dtype"`  // of published weights, "source" resolved
	State     State        `json:"state"`
	Paused    bool         `json:"paused"`
	Step      int64        `json:"step"`
	LastError *LastError   `json:"last_error,omitempty"`
	// Fingerprint is of the newest opening of the device; nil in records of older versions.
	Fingerprint        *fingerprint        `json:"fingerprint,omitempty"`
	FingerprintChanges []FingerprintChange `json:"fingerprint_changes,omitempty"`
}

// Metrics are a step's numbers. What is not finite is null in JSON, which has no name for it.
type Metrics map[string]float64

// MarshalJSON implements json.Marshaler.
func (m Metrics) MarshalJSON() ([]byte, error) {
	out := make(map[string]*float64, len(m))
	for k, v := range m {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			out[k] = nil
			continue
		}
		out[k] = &v
	}
	return json.Marshal(out)
}

// UnmarshalJSON implements json.Unmarshaler; null reads as NaN.
func (m *Metrics) UnmarshalJSON(raw []byte) error {
	var in map[string]*float64
	if err := json.Unmarshal(raw, &in); err != nil {
		return err
	}
	*m = make(Metrics, len(in))
	for k, v := range in {
		if v == nil {
			(*m)[k] = math.NaN()
		} else {
			(*m)[k] = *v
		}
	}
	return nil
}

// StepRecord says what one optimizer step consumed and measured. It is written
// when the step is done, and with the spool it is all that a replay needs.
type StepRecord struct {
	Step      int64     `json:"step"` // steps done after it
	Time      time.Time `json:"time"`
	First     int64     `json:"first"`             // the first step on the same groups; differs from Step with iterations > 1
	Last      bool      `json:"last"`              // the groups are done with
	Groups    []string  `json:"groups"`            // in the order trained
	Batches   []uint64  `json:"batches"`           // whose rows completed them
	LogSeq    uint64    `json:"log_seq"`           // newest spool record when the groups were taken
	Delayed   int64     `json:"delayed,omitempty"` // open groups that the step was put off for
	WallClock float64   `json:"wall_time"`         // seconds
	Metrics   Metrics   `json:"metrics"`
}

// idemRecord remembers what an Idempotency-Key was used for.
type idemRecord struct {
	Digest string `json:"digest"` // SHA-256 of the body
	Job    JobID  `json:"job"`
}

var (
	bucketMeta  = []byte("meta")
	bucketJobs  = []byte("jobs")  // id -> jobRecord
	bucketSteps = []byte("steps") // id -> bucket: step, 8 bytes big-endian -> StepRecord
	bucketIdem  = []byte("idempotency")
)

// recordsVersion is the layout of the database. A newer one is refused.
const recordsVersion = "1"

// records is the embedded database of jobs and steps.
type records struct{ db *bbolt.DB }

func openRecords(path string) (*records, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: 2 * time.Second, NoSync: crashpoint.Off("records.fsync")})
	if err != nil {
		if errors.Is(err, bbolterrors.ErrTimeout) {
			return nil, fault.New(fault.Unavailable, "data_in_use", "open %s: another trainerd holds it", path)
		}
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if err := durable.SyncDir("records.name", filepath.Dir(path)); err != nil {
		db.Close()
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	r := &records{db: db}
	err = r.update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketJobs, bucketSteps, bucketIdem, bucketLeases} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		meta := tx.Bucket(bucketMeta)
		if v := meta.Get([]byte("version")); v != nil && string(v) != recordsVersion {
			return fault.New(fault.Invalid, "data_version", "open %s: layout version %s, expected %s", path, v, recordsVersion)
		}
		return meta.Put([]byte("version"), []byte(recordsVersion))
	})
	if err != nil {
		db.Close()
		return nil, err
	}
	return r, nil
}

func (r *records) close() error { return r.db.Close() }

// update runs a transaction; what it wrote is durable when it returns nil.
func (r *records) update(do func(*bbolt.Tx) error) error {
	defer crashpoint.Enter(crashpoint.Record)()
	return crashpoint.Transact(r.db.Path(), func() error { return r.db.Update(do) })
}

func put(b *bbolt.Bucket, key []byte, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put(key, data)
}

// createJob writes a new job and, with a key, what the key was used for.
func (r *records) createJob(j jobRecord, key, digest string) error {
	defer crashpoint.Enter(crashpoint.Record)()
	defer crashpoint.Reach("job.recorded")
	crashpoint.Reach("job.before_record")
	return r.update(func(tx *bbolt.Tx) error {
		if key != "" {
			if err := put(tx.Bucket(bucketIdem), []byte(key), idemRecord{Digest: digest, Job: j.ID}); err != nil {
				return err
			}
		}
		return put(tx.Bucket(bucketJobs), []byte(j.ID), j)
	})
}

// putJob writes a job and, when not nil, the step that it just did, together.
func (r *records) putJob(j jobRecord, step *StepRecord) error {
	err := r.update(func(tx *bbolt.Tx) error {
		if step != nil && !crashpoint.Off("records.step") {
			b, err := tx.Bucket(bucketSteps).CreateBucketIfNotExists([]byte(j.ID))
			if err != nil {
				return err
			}
			if err := put(b, stepKey(step.Step), step); err != nil {
				return err
			}
		}
		return put(tx.Bucket(bucketJobs), []byte(j.ID), j)
	})
	if err != nil {
		return fmt.Errorf("write record of job %s: %w", j.ID, err)
	}
	return nil
}

func stepKey(step int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(step)) }

// jobs reads all jobs in the order of their ids.
func (r *records) jobs() ([]jobRecord, error) {
	var out []jobRecord
	err := r.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketJobs).ForEach(func(k, v []byte) error {
			var j jobRecord
			if err := json.Unmarshal(v, &j); err != nil {
				return fmt.Errorf("read record of job %s: %w", k, err)
			}
			out = append(out, j)
			return nil
		})
	})
	return out, err
}

// steps reads up to limit records of steps after the given one, oldest first.
func (r *records) steps(id JobID, after int64, limit int) ([]StepRecord, error) {
	out := []StepRecord{}
	err := r.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketSteps).Bucket([]byte(id))
		if b == nil {
			return nil
		}
		c := b.Cursor()
		for k, v := c.Seek(stepKey(after + 1)); k != nil && len(out) < limit; k, v = c.Next() {
			var s StepRecord
			if err := json.Unmarshal(v, &s); err != nil {
				return fmt.Errorf("read step %x of job %s: %w", k, id, err)
			}
			out = append(out, s)
		}
		return nil
	})
	return out, err
}

// idempotent returns what a key was used for; ok is false for a new key.
func (r *records) idempotent(key string) (rec idemRecord, ok bool, err error) {
	err = r.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketIdem).Get([]byte(key))
		if v == nil {
			return nil
		}
		ok = true
		return json.Unmarshal(v, &rec)
	})
	return rec, ok, err
}
