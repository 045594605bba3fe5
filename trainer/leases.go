package trainer

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"

	"trainerd/internal/fault"
)

// Lease keeps the checkpoints of a step until it expires: retention spares them
// for a reader that is downloading or serving one.
type Lease struct {
	ID      string    `json:"id"`
	Step    int64     `json:"step"`
	Holder  string    `json:"holder"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
}

// Bounds of leases. Those of steps bound what readers can make a store keep
// beyond what the job's policy keeps.
const (
	maxLeases      = 256 // of a job
	maxLeasedSteps = 32  // of a job
	// MinLease and MaxLease bound how long a lease may last without a renewal.
	MinLease = time.Second
	MaxLease = 24 * time.Hour
)

var bucketLeases = []byte("leases") // "{job}/{id}" -> Lease

// leases are those of all jobs, in memory as in the database. A step is either
// leased or being deleted, never both: whoever comes first under mu wins.
type leases struct {
	db   *records
	wake chan struct{} // one token: a lease ended, or the next expiry came nearer

	mu      sync.Mutex
	held    map[JobID]map[string]Lease
	pending map[JobID]map[int64]int  // steps that are being leased, not yet known to exist
	going   map[JobID]map[int64]bool // steps whose checkpoint is being deleted
	ended   map[JobID]bool           // jobs with something to retain anew
}

func openLeases(db *records) (*leases, error) {
	l := &leases{db: db, wake: make(chan struct{}, 1), held: map[JobID]map[string]Lease{},
		pending: map[JobID]map[int64]int{}, going: map[JobID]map[int64]bool{}, ended: map[JobID]bool{}}
	err := db.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketLeases).ForEach(func(k, v []byte) error {
			job, _, _ := strings.Cut(string(k), "/")
			var one Lease
			if err := json.Unmarshal(v, &one); err != nil {
				return fmt.Errorf("read lease %s: %w", k, err)
			}
			l.put(JobID(job), one)
			return nil
		})
	})
	return l, err
}

func (l *leases) put(job JobID, one Lease) {
	if l.held[job] == nil {
		l.held[job] = map[string]Lease{}
	}
	l.held[job][one.ID] = one
}

func (l *leases) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// write makes a lease durable; one without an id of a job removes it. Called with mu held.
func (l *leases) write(job JobID, id string, one *Lease) error {
	err := l.db.update(func(tx *bbolt.Tx) error {
		key := []byte(string(job) + "/" + id)
		if one == nil {
			return tx.Bucket(bucketLeases).Delete(key)
		}
		return put(tx.Bucket(bucketLeases), key, one)
	})
	if err != nil {
		return fault.New(fault.Unavailable, "records_unavailable", "record the lease: %w", err)
	}
	return nil
}

// begin spares a step for a lease that is about to be taken. end undoes it.
func (l *leases) begin(job JobID, step int64, now time.Time) (end func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.going[job][step] {
		return nil, &fault.Error{Kind: fault.Conflict, Code: "checkpoint_going", Msg: "lease the checkpoint: retention is deleting it",
			Fields: []fault.Field{{Name: "step", Row: -1, Got: strconv.FormatInt(step, 10), Expected: "a newer step"}}}
	}
	steps, count, soonest := map[int64]bool{}, 0, time.Time{}
	for s, n := range l.pending[job] {
		steps[s], count = true, count+n
	}
	for _, one := range l.held[job] {
		if one.Expires.After(now) {
			steps[one.Step] = true
			count++
			if soonest.IsZero() || one.Expires.Before(soonest) {
				soonest = one.Expires
			}
		}
	}
	if full := count >= maxLeases; full || !steps[step] && len(steps) >= maxLeasedSteps {
		what := fmt.Sprintf("%d steps are leased, which is the limit", len(steps))
		if full {
			what = fmt.Sprintf("%d leases are held, which is the limit", count)
		}
		return nil, &fault.Error{Kind: fault.Busy, Code: "too_many_leases", Msg: "lease the checkpoint: " + what,
			RetryAfter: min(max(soonest.Sub(now), time.Second), time.Minute)}
	}
	if l.pending[job] == nil {
		l.pending[job] = map[int64]int{}
	}
	l.pending[job][step]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.pending[job][step]--; l.pending[job][step] == 0 {
			delete(l.pending[job], step)
		}
	}, nil
}

// leased says whether a step may not be deleted. Called with mu held.
func (l *leases) leased(job JobID, step int64, now time.Time) bool {
	if l.pending[job][step] > 0 {
		return true
	}
	for _, one := range l.held[job] {
		if one.Step == step && one.Expires.After(now) {
			return true
		}
	}
	return false
}

// remove asks whether a step may be deleted. From a yes until done is called
// nobody leases it; done after a failure leaves it so, for what a store answered
// with an error may be carried out later.
func (l *leases) remove(job JobID, step int64) (done func(error), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leased(job, step, time.Now()) {
		return nil, false
	}
	if l.going[job] == nil {
		l.going[job] = map[int64]bool{}
	}
	l.going[job][step] = true
	return func(err error) {
		if err == nil {
			l.mu.Lock()
			defer l.mu.Unlock()
			delete(l.going[job], step)
		}
	}, true
}

// collect drops what has expired, and returns the jobs that a lease ended of
// since the last call and the next expiry (zero: none).
func (l *leases) collect(now time.Time) (ended []JobID, next time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for job, of := range l.held {
		for id, one := range of {
			if one.Expires.After(now) {
				if next.IsZero() || one.Expires.Before(next) {
					next = one.Expires
				}
				continue
			}
			if err = l.write(job, id, nil); err != nil {
				return nil, now.Add(time.Minute), err
			}
			delete(of, id)
			l.ended[job] = true
		}
	}
	for job := range l.ended {
		ended = append(ended, job)
	}
	clear(l.ended)
	return ended, next, nil
}

// keepLeases collects expired leases until the manager closes, and lets
// retention catch up with what they had spared.
func (m *Manager) keepLeases() {
	defer m.running.Done()
	for {
		ended, next, err := m.leases.collect(time.Now())
		if err != nil {
			m.log.Warn("collect expired leases", "err", err)
		}
		for _, id := range ended {
			if j, err := m.Job(id); err == nil && j.State() != Loading { // after loading comes a publication
				m.untilClosed(context.Background(), func(ctx context.Context) error { j.retain(ctx); return nil })
			}
		}
		var timer <-chan time.Time
		if !next.IsZero() {
			timer = time.After(max(time.Until(next), 0) + time.Millisecond)
		}
		select {
		case <-timer:
		case <-m.leases.wake:
		case <-m.closed:
			return
		}
	}
}

// checkName refuses names that are unfit for logs and labels.
func checkName(field, name string) error {
	ok := len(name) >= 1 && len(name) <= 128
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-_.:@/", c) >= 0
	}
	if !ok {
		return fault.BadField(field, strconv.Quote(clip(name)), "1 to 128 letters, digits and -_.:@/")
	}
	return nil
}

func checkTTL(ttl time.Duration) error {
	if ttl < MinLease || ttl > MaxLease {
		return fault.BadField("ttl", ttl, fmt.Sprintf("a duration from %v to %v", MinLease, MaxLease))
	}
	return nil
}

// Lease keeps the checkpoints of a step for a while. The lease holds when it is
// returned: it is durable, and the checkpoint was there with retention kept away.
func (j *Job) Lease(ctx context.Context, step int64, holder string, ttl time.Duration) (Lease, error) {
	if err := checkName("holder", holder); err != nil {
		return Lease{}, err
	}
	if err := checkTTL(ttl); err != nil {
		return Lease{}, err
	}
	l := j.m.leases
	end, err := l.begin(j.ID, step, time.Now())
	if err != nil {
		return Lease{}, err
	}
	defer end()
	if _, err := j.Checkpoint(ctx, step); err != nil {
		return Lease{}, err
	}
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return Lease{}, fmt.Errorf("draw a lease id: %w", err)
	}
	now := time.Now().UTC()
	one := Lease{ID: "lease-" + hex.EncodeToString(b[:]), Step: step, Holder: holder, Created: now, Expires: now.Add(ttl)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.write(j.ID, one.ID, &one); err != nil {
		return Lease{}, err
	}
	l.put(j.ID, one)
	l.poke()
	return one, nil
}

// find returns a lease of a step that still holds. Called with mu held.
func (l *leases) find(job JobID, step int64, id string, now time.Time) (Lease, error) {
	one, ok := l.held[job][id]
	if !ok || one.Step != step || !one.Expires.After(now) {
		return Lease{}, &fault.Error{Kind: fault.NotFound, Code: "lease_not_found", Msg: "no such lease, or it has expired",
			Fields: []fault.Field{{Name: "lease", Row: -1, Got: strconv.Quote(clip(id)), Expected: "a lease of this checkpoint that holds"}}}
	}
	return one, nil
}

// Renew makes a lease that still holds last for ttl from now.
func (j *Job) Renew(step int64, id string, ttl time.Duration) (Lease, error) {
	if err := checkTTL(ttl); err != nil {
		return Lease{}, err
	}
	l := j.m.leases
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UTC()
	one, err := l.find(j.ID, step, id, now)
	if err != nil {
		return Lease{}, err
	}
	one.Expires = now.Add(ttl)
	if err := l.write(j.ID, id, &one); err != nil {
		return Lease{}, err
	}
	l.put(j.ID, one)
	l.poke()
	return one, nil
}

// Release ends a lease.
func (j *Job) Release(step int64, id string) error {
	l := j.m.leases
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := l.find(j.ID, step, id, time.Now()); err != nil {
		return err
	}
	if err := l.write(j.ID, id, nil); err != nil {
		return err
	}
	delete(l.held[j.ID], id)
	l.ended[j.ID] = true
	l.poke()
	return nil
}

// Leases lists the leases of a step that hold, oldest first.
func (j *Job) Leases(step int64) []Lease {
	l := j.m.leases
	l.mu.Lock()
	defer l.mu.Unlock()
	out, now := []Lease{}, time.Now()
	for _, one := range l.held[j.ID] {
		if one.Step == step && one.Expires.After(now) {
			out = append(out, one)
		}
	}
	slices.SortFunc(out, func(a, b Lease) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out
}
