package trainer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"trainerd/internal/durable"
	"trainerd/internal/fault"
	"trainerd/kernels"
	"trainerd/storage"
)

// Limits bound what one server takes. Zero values mean the defaults.
type Limits struct {
	MaxBatchBytes     int64 // of an Arrow body, and of its decompressed buffers; default 64 MiB
	MaxBatchRows      int   // default 65536
	MaxBatchTokens    int64 // prompts counted per row; default 16 Mi
	MaxQueuedRollouts int   // of a job; default 262144
	MaxQueuedTokens   int64 // of a job, each prompt once; default 256 Mi
	MaxQueuedBytes    int64 // of a job, its rows' payload in memory; default 2 GiB
	MaxJobs           int   // that are not final; default 64
	MaxSampleRows     int   // completions of one sampling request; default 4096
	Decoders          int   // Arrow bodies decoded at once; default 4
	EventRing         int   // events kept of a job; default 1024
	SegmentBytes      int64 // of a spool; default 64 MiB
	MaxCaptureBytes   int64 // host memory of all publications under way; a checkpoint beyond it holds its job's training while it is written; default 8 GiB
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def64 := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	def64(&l.MaxBatchBytes, 64<<20)
	def(&l.MaxBatchRows, 1<<16)
	def64(&l.MaxBatchTokens, 16<<20)
	def(&l.MaxQueuedRollouts, 1<<18)
	def64(&l.MaxQueuedTokens, 256<<20)
	def64(&l.MaxQueuedBytes, 2<<30)
	def(&l.MaxJobs, 64)
	def(&l.MaxSampleRows, 4096)
	def(&l.Decoders, 4)
	def(&l.EventRing, 1024)
	def64(&l.SegmentBytes, 64<<20)
	def64(&l.MaxCaptureBytes, 8<<30)
	return l
}

// Options are what a Manager is made of. Device, DataDir and Store are required.
type Options struct {
	Device kernels.Device // used by the manager alone until Close returned; then the caller closes Manager.Device
	// Reopen opens the same device again, after it was lost and closed. nil: jobs
	// wait for a restart then.
	Reopen func() (kernels.Device, error)
	// DeviceMemory is the most bytes that models take on the device together;
	// 0: what it has free when the manager begins.
	DeviceMemory int64
	// SwapMemory is the most bytes of host memory for models of jobs that do not
	// fit on the device together; 0: such jobs are refused.
	SwapMemory int64
	// SwapHold is how long a model that came to the device stays while its job has
	// work and others wait; at least for one piece of work. 0: that piece only.
	SwapHold time.Duration
	DataDir  string       // database, spools and pulled base models
	Store    storage.Blob // checkpoints
	// OpenStore opens the store of an s3:// model source, rooted at the source's
	// prefix. nil: such sources are refused.
	OpenStore func(ctx context.Context, url string) (storage.Blob, error)
	// Sources says whether a job may name a model source, and returns the source as
	// it is to be recorded and opened. It is asked again whenever the source is
	// opened anew. nil: any.
	Sources   func(source string) (string, error)
	Logger    *slog.Logger // nil: none
	Tracer    trace.Tracer // nil: none
	Version   string       // of trainerd, written to manifests
	PeakFLOPS float64      // of the device, for the metric "mfu"; 0: not reported
	Limits    Limits
	// Dry has steps taken, checked, packed and recorded, but not computed: weights
	// stay as they are. It is for measuring what surrounds the model.
	Dry bool
	// BeforeSync, when set, is called before each fsync of a spool: a slow disk, for tests.
	BeforeSync func()
}

// Manager owns a device, its jobs and their records.
type Manager struct {
	opts   Options
	limits Limits
	log    *slog.Logger
	db     *records
	exec   *executor
	ckpts  storage.Checkpoints
	leases *leases
	deltas chan struct{} // one token for each delta being computed
	decode chan struct{} // one token for each Arrow body being decoded
	disk   *dataDisk
	// captures is the host memory of publications under way and what is kept for the next.
	captures captureBudget

	home   *residence
	losses atomic.Int64 // of the device
	// pinFailures counts memory of captures that the device refused to know.
	pinFailures atomic.Int64
	creating    sync.Mutex // serialises Create

	// of the device's goroutine
	proven  bool  // a piece of work succeeded since the device was opened
	suspect JobID // whose work lost the device before anything succeeded on it

	mu   sync.Mutex
	jobs map[JobID]*Job
	dev  kernels.Device // nil once it is lost, until it is opened anew
	// unopened is how often in a row a lost device could not be opened, for unopenedBy.
	unopened   int
	unopenedBy error
	closing    bool
	closed     chan struct{}  // closed when Close begins
	running    sync.WaitGroup // goroutines of jobs
}

// NewManager opens the records below DataDir and starts the jobs found there.
func NewManager(o Options) (*Manager, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := durable.MkdirAll("data.dir_name", filepath.Join(o.DataDir, "jobs"), 0o750); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	db, err := openRecords(filepath.Join(o.DataDir, "trainerd.db"))
	if err != nil {
		return nil, err
	}
	found, err := db.jobs()
	if err != nil {
		db.close()
		return nil, err
	}
	leases, err := openLeases(db)
	if err != nil {
		db.close()
		return nil, err
	}
	limits := o.Limits.withDefaults()
	m := &Manager{
		opts: o, limits: limits, log: o.Logger, db: db, exec: newExecutor(), dev: o.Device,
		ckpts: storage.Checkpoints{Blob: o.Store}, leases: leases, deltas: make(chan struct{}, maxDeltas), decode: make(chan struct{}, limits.Decoders),
		jobs: map[JobID]*Job{}, closed: make(chan struct{}),
		disk: openDataDisk(o.DataDir),
	}
	m.captures.limit = limits.MaxCaptureBytes
	budget := o.Device.Info().MemFree
	if o.DeviceMemory > 0 {
		budget = min(budget, o.DeviceMemory)
	}
	m.home = newResidence(budget, o.SwapMemory, o.SwapHold)
	m.exec.barred = m.home.barred
	m.exec.start()
	slices.SortFunc(found, func(a, b jobRecord) int { return a.Created.Compare(b.Created) })
	for _, rec := range found {
		m.jobs[rec.ID] = m.newJob(rec)
	}
	if err := m.sweepUnrecorded(); err != nil {
		m.log.Warn("sweep the data directory", "err", err)
	}
	for _, j := range m.jobs {
		m.start(j, nil, true)
	}
	m.running.Add(1)
	go m.keepLeases()
	if s, ok := o.Store.(partStore); ok {
		m.spawn(false, func() { m.sweepParts(s) })
	}
	return m, nil
}

// start runs a job's goroutine. base is its opened source, nil to open it again.
func (m *Manager) start(j *Job, base *baseModel, restored bool) {
	m.running.Add(1)
	ctx, cancel := context.WithCancel(context.Background())
	j.kill = func() { cancel(); j.abortFlight() }
	go func() {
		defer m.running.Done()
		defer cancel()
		j.run(ctx, base, restored)
	}()
}

// jobDir is where a job's spool and base model lie.
func (m *Manager) jobDir(id JobID) string { return filepath.Join(m.opts.DataDir, "jobs", string(id)) }

// Create makes a job of a document and starts it. With an idempotency key the
// same body answers the job that it made before (created is false); another
// body is refused. A job that cannot fit is refused before anything is kept.
func (m *Manager) Create(ctx context.Context, body []byte, key string) (job *Job, created bool, err error) {
	if err := m.awaitSource(ctx, body); err != nil {
		return nil, false, err
	}
	m.creating.Lock()
	defer m.creating.Unlock()
	sum := sha256.Sum256(body)
	digest := hex.EncodeToString(sum[:])
	if key != "" {
		if job, err := m.createdBefore(key, digest); job != nil || err != nil {
			return job, false, err
		}
	}
	spec, err := ParseSpec(body)
	if err != nil {
		return nil, false, err
	}
	if err := spec.Limits.within(m.limits); err != nil {
		return nil, false, err
	}
	if err := m.admitJob(); err != nil {
		return nil, false, err
	}
	rec := jobRecord{ID: newJobID(), Created: time.Now().UTC(), Spec: spec, State: Loading}
	base, err := m.resolve(ctx, rec.ID, spec.Model.Source, &spec)
	if err != nil {
		return nil, false, err
	}
	rec.Source = base.source
	kept := false
	defer func() {
		if !kept {
			base.close()
			m.home.drop(rec.ID)
			os.RemoveAll(m.jobDir(rec.ID))
		}
	}()
	if base.pull == nil { // it is here: what is wrong with it is said now
		if err := base.open(&spec); err != nil {
			return nil, false, err
		}
		if err := m.fit(ctx, rec.ID, &spec, base); err != nil {
			return nil, false, err
		}
		rec.Model, rec.DType = base.config(), base.dtype
	}
	job = m.newJob(rec)
	if err := job.openLog(); err != nil {
		return nil, false, m.disk.fault("spool_unavailable", "create the job", err)
	}
	job.fed = true // its spool is empty
	if err := m.db.createJob(rec, key, digest); err != nil {
		job.closeLog()
		return nil, false, m.disk.fault("records_unavailable", "record the job", err)
	}
	m.mu.Lock()
	if m.closing {
		m.mu.Unlock()
		kept = true // it is recorded: the next start runs it
		base.close()
		return nil, false, errors.Join(errClosed, job.closeLog())
	}
	m.jobs[rec.ID] = job
	m.start(job, base, false)
	m.mu.Unlock()
	kept = true
	m.log.InfoContext(ctx, "job created", "job", rec.ID, "name", spec.Name, "source", rec.Source, "objective", spec.Objective.Name)
	return job, true, nil
}

// untilClosed runs what is not worth waiting for when the server stops: its
// context ends when Close begins.
func (m *Manager) untilClosed(ctx context.Context, do func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-m.closed:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := do(ctx)
	cancel()
	<-ended
	select {
	case <-m.closed:
		return errClosed
	default:
		return err
	}
}

// awaitSource waits for the last checkpoint of a source job:ID@latest that has
// done its last step and is about to publish it: latest would name an older one.
func (m *Manager) awaitSource(ctx context.Context, body []byte) error {
	spec, err := ParseSpec(body)
	if err != nil {
		return nil // Create says so
	}
	ref, ok := parseJobSource(spec.Model.Source)
	if !ok || ref.Step >= 0 {
		return nil
	}
	j, err := m.Job(ref.Job)
	if err != nil {
		return nil // its checkpoints may exist all the same
	}
	j.mu.Lock()
	finishing := j.lastStepDone() && !j.state.Final()
	j.mu.Unlock()
	if !finishing {
		return nil
	}
	select {
	case <-j.ended:
		return nil
	case <-m.closed:
		return errClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// createdBefore looks an idempotency key up; nil, nil for a new one.
func (m *Manager) createdBefore(key, digest string) (*Job, error) {
	rec, ok, err := m.db.idempotent(key)
	if err != nil || !ok {
		return nil, err
	}
	if rec.Digest != digest {
		return nil, keyReused(key)
	}
	return m.Job(rec.Job)
}

func keyReused(key string) error {
	return &fault.Error{Kind: fault.Invalid, Code: "idempotency_key_reused", Msg: "the key was used with another body",
		Fields: []fault.Field{{Name: "Idempotency-Key", Row: -1, Got: clip(key), Expected: "a new key for a new body"}}}
}

// admitJob refuses a job over the limit of jobs that are not final.
func (m *Manager) admitJob() error {
	active := 0
	for _, j := range m.Jobs() {
		if !j.State().Final() {
			active++
		}
	}
	if active >= m.limits.MaxJobs {
		return &fault.Error{Kind: fault.Busy, Code: "too_many_jobs", RetryAfter: time.Minute,
			Msg: fmt.Sprintf("%d jobs are active, which is the limit", active)}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closing {
		return errClosed
	}
	return nil
}

// Job returns a job by its id.
func (m *Manager) Job(id JobID) (*Job, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if j, ok := m.jobs[id]; ok {
		return j, nil
	}
	return nil, &fault.Error{Kind: fault.NotFound, Code: "job_not_found", Msg: "no such job",
		Fields: []fault.Field{{Name: "job", Row: -1, Got: clip(string(id)), Expected: "the id of a job"}}}
}

// Jobs returns all jobs, oldest first.
func (m *Manager) Jobs() []*Job {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*Job, 0, len(m.jobs))
	for _, j := range m.jobs {
		out = append(out, j)
	}
	slices.SortFunc(out, func(a, b *Job) int {
		if c := a.created.Compare(b.created); c != 0 {
			return c
		}
		return strings.Compare(string(a.ID), string(b.ID))
	})
	return out
}

// Ready says whether the manager takes work: nil, or why not.
func (m *Manager) Ready(ctx context.Context) error {
	m.mu.Lock()
	closing := m.closing
	m.mu.Unlock()
	if closing {
		return errClosed
	}
	if _, err := m.deviceFault(); err != nil {
		return err
	}
	if _, err := m.ckpts.Blob.Stat(ctx, "ready"); err != nil && !errors.Is(err, storage.ErrNotFound) {
		return fault.New(fault.Unavailable, "store_unavailable", "reach the checkpoint store: %w", err)
	}
	if _, err := m.disk.state(); err != nil {
		return err
	}
	// A store that answers may still take nothing.
	for _, j := range m.Jobs() {
		if e := j.failing(); e != nil && e.Code == "publish_failed" {
			return fault.New(fault.Unavailable, e.Code, "job %s: %s", j.ID, e.Message)
		}
	}
	return nil
}

// Limits returns the limits in force.
func (m *Manager) Limits() Limits { return m.limits }

// Close stops intake, lets every job finish its optimizer step, writes a
// snapshot of jobs that have made steps since their last one, and frees the
// models. When ctx ends first, running work is cut short; nothing accepted is
// lost, the next start replays it.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock()
	if m.closing {
		m.mu.Unlock()
		return nil
	}
	m.closing = true
	close(m.closed)
	m.mu.Unlock()

	ended := make(chan struct{})
	go func() { m.running.Wait(); close(ended) }()
	var err error
	select {
	case <-ended:
	case <-ctx.Done():
		err = fmt.Errorf("stop jobs: %w", ctx.Err())
		for _, j := range m.Jobs() {
			j.kill()
		}
		<-ended
	}
	jobs := m.Jobs()
	for _, j := range jobs {
		j.unload(context.WithoutCancel(ctx))
		j.events.close()
	}
	m.exec.Close()
	m.disk.close()
	for _, j := range jobs {
		err = errors.Join(err, j.closeLog())
	}
	return errors.Join(err, m.db.close())
}
