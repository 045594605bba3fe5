package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"trainerd/client"
	"trainerd/internal/fault"
	"trainerd/kernels/cpu"
	"trainerd/model"
	"trainerd/model/hf"
	"trainerd/server"
	"trainerd/storage/disk"
	"trainerd/trainer"
)

// IngestOptions say what Ingest sends. All but RowIDs, Feed and Progress are required.
type IngestOptions struct {
	Rows       int // in all; a multiple of BatchRows
	BatchRows  int // of a body; a multiple of GroupSize
	GroupSize  int
	Prompt     int // tokens of a prompt, which each row of a group repeats on the wire
	Completion int // tokens, each with its log-prob
	Producers  int // bodies under way at once
	RowIDs     bool
	Dir        string        // for spool, database and store; what is measured is its disk
	StageTime  time.Duration // for which each stage alone is repeated, and the disk four times as long

	// Feed runs the producers, so that their processor time can be another
	// process's. nil: Feed of this package, in this process.
	Feed func(ctx context.Context, f FeedOptions) (FeedResult, error)
}

// check names the first option that cannot be.
func (o IngestOptions) check() error {
	switch {
	case o.GroupSize < 1:
		return fault.BadField("group-size", o.GroupSize, "1 or more")
	case o.BatchRows < o.GroupSize || o.BatchRows%o.GroupSize != 0 || o.BatchRows > 1<<16:
		return fault.BadField("batch", o.BatchRows, fmt.Sprintf("a multiple of the group size %d, at most 65536", o.GroupSize))
	case o.Rows < o.BatchRows || o.Rows%o.BatchRows != 0:
		return fault.BadField("rows", o.Rows, fmt.Sprintf("a multiple of the %d rows of a batch", o.BatchRows))
	case o.Prompt < 1:
		return fault.BadField("prompt", o.Prompt, "1 or more tokens")
	case o.Completion < 1:
		return fault.BadField("completion", o.Completion, "1 or more tokens")
	case o.Prompt+o.Completion > ingestMaxTokens:
		return fault.BadField("completion", o.Completion, fmt.Sprintf("at most %d tokens with the prompt", ingestMaxTokens))
	case o.Producers < 1:
		return fault.BadField("producers", o.Producers, "1 or more")
	case o.StageTime <= 0:
		return fault.BadField("stage-time", o.StageTime, "a duration over 0")
	}
	return nil
}

const (
	ingestVocab     = 1024
	ingestMaxTokens = 16384 // of a micro-batch
	// ingestAhead is how many batches the queue may hold: enough that a step
	// never waits for rows, few enough that memory says nothing of the total.
	ingestAhead = 32
	// ingestSnapshot is after how many steps the queue is written and the log trimmed.
	ingestSnapshot = 128
)

// IngestResult is the line of output of Ingest. MB are 10^6 bytes of Arrow
// stream as sent; processor time is that of the server's process, all threads,
// kernel included.
type IngestResult struct {
	Name       string `json:"name"`
	Rows       int    `json:"rows"`
	BatchRows  int    `json:"batch_rows"`
	BatchBytes int    `json:"batch_bytes"`
	Prompt     int    `json:"prompt"`
	Completion int    `json:"completion"`
	Producers  int    `json:"producers"`
	RowIDs     bool   `json:"row_ids"`
	OwnFeed    bool   `json:"feed_in_process"` // then the producers' time is in CPUSeconds

	Seconds    float64            `json:"seconds"` // from the first body to the last group packed
	MBs        float64            `json:"mb_s"`
	RowsS      float64            `json:"rows_s"`
	CPUSeconds float64            `json:"cpu_s"`
	UserShare  float64            `json:"cpu_user_share"`
	MBsCore    float64            `json:"mb_s_core"` // bytes by processor seconds: what one busy core takes
	Cores      float64            `json:"cores_busy"`
	Accept     map[string]float64 `json:"accept_s"` // at the producer, request to answer
	Refused    int                `json:"refused_429"`
	Steps      int64              `json:"steps"`

	RSSStartMB float64 `json:"rss_start_mb"`
	RSSPeakMB  float64 `json:"rss_peak_mb"`
	RSSEndMB   float64 `json:"rss_end_mb"`
	RSSSlopeMB float64 `json:"rss_slope_mb_s"` // of a line through the samples after the first third

	DiskOneMBs float64 `json:"disk_one_mb_s"` // a body, then fsync
	DiskMBs    float64 `json:"disk_mb_s"`     // as many bodies as there are producers, then fsync
	DiskShare  float64 `json:"disk_share"`    // MBs by the greater of the two

	Stages []IngestStage `json:"stages"`
	// Rest is the processor time of a byte that no stage has: receiving, HTTP,
	// the step's record, garbage collection in between.
	RestNs float64 `json:"rest_ns_byte"`
}

// Ingest drives bodies of rollouts over HTTP into a job whose steps are dry:
// read, decoded, validated, written and synced to the spool, assembled into
// groups, taken, and packed for a step, but not computed.
func Ingest(ctx context.Context, o IngestOptions) (IngestResult, error) {
	r := IngestResult{Name: "ingest", Rows: o.Rows, BatchRows: o.BatchRows, Prompt: o.Prompt, Completion: o.Completion, Producers: o.Producers, RowIDs: o.RowIDs, OwnFeed: o.Feed == nil}
	if err := o.check(); err != nil {
		return r, err
	}
	feed := FeedOptions{Rows: o.Rows, BatchRows: o.BatchRows, GroupSize: o.GroupSize, Prompt: o.Prompt, Completion: o.Completion, Producers: o.Producers, RowIDs: o.RowIDs}
	body, err := feed.template()
	if err != nil {
		return r, err
	}
	r.BatchBytes = len(body.bytes)
	if r.DiskOneMBs, err = syncedRate(o.Dir, body.bytes, 1, 4*o.StageTime); err != nil {
		return r, err
	}
	if r.DiskMBs, err = syncedRate(o.Dir, body.bytes, o.Producers, 4*o.StageTime); err != nil {
		return r, err
	}
	if r.Stages, err = ingestStages(ctx, o, body); err != nil {
		return r, err
	}
	if err := r.serve(ctx, o, feed); err != nil {
		return r, err
	}
	sent := float64(o.Rows/o.BatchRows) * float64(r.BatchBytes)
	r.MBs, r.MBsCore, r.RowsS = sent/1e6/r.Seconds, sent/1e6/r.CPUSeconds, float64(o.Rows)/r.Seconds
	r.Cores = r.CPUSeconds / r.Seconds
	r.DiskShare = r.MBs / max(r.DiskOneMBs, r.DiskMBs)
	r.RestNs = 1e9 * r.CPUSeconds / sent
	for _, s := range r.Stages {
		if s.InPath {
			r.RestNs -= s.NsByte
		}
	}
	return r, nil
}

// serve runs the server and the producers.
func (r *IngestResult) serve(ctx context.Context, o IngestOptions, feed FeedOptions) (err error) {
	s, err := startIngest(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	c, err := client.New(s.url, client.Options{Retries: -1})
	if err != nil {
		return err
	}
	job, err := c.CreateJob(ctx, ingestDocument(o, s.source), "")
	if err != nil {
		return err
	}
	if _, err := c.Wait(ctx, job.ID, 0, func(j client.Job) bool { return j.PolicyStep >= 0 || j.Final() }); err != nil {
		return err
	}
	feed.URL, feed.Job = s.url, job.ID
	run := o.Feed
	if run == nil {
		run = Feed
	}
	watch, err := watchRSS()
	if err != nil {
		return err
	}
	before, began := processTime(), time.Now()
	fed, err := run(ctx, feed)
	if err == nil {
		job, err = c.Wait(ctx, job.ID, 20*time.Millisecond, func(j client.Job) bool {
			return j.Final() || j.Queue.Rollouts == 0 && j.State == "waiting"
		})
	}
	took, after := time.Since(began), processTime()
	samples := watch()
	if err != nil {
		return err
	}
	if fed.Rows != o.Rows || int(job.Counts.GroupsTrained)*o.GroupSize != o.Rows {
		return fmt.Errorf("ingest: %d rows accepted and %d groups packed, expected %d rows in groups of %d", fed.Rows, job.Counts.GroupsTrained, o.Rows, o.GroupSize)
	}
	r.Seconds, r.Accept, r.Refused, r.Steps = took.Seconds(), percentiles(fed.Accept), fed.Refused, job.Step
	user, system := after.user-before.user, after.system-before.system
	r.CPUSeconds, r.UserShare = (user + system).Seconds(), user.Seconds()/(user+system).Seconds()
	r.RSSStartMB, r.RSSEndMB = samples[0], samples[len(samples)-1]
	for _, v := range samples {
		r.RSSPeakMB = max(r.RSSPeakMB, v)
	}
	r.RSSSlopeMB = fit(samples).SlopeMB / 60 * float64(time.Second/rssEvery)
	return nil
}

// ingestDocument is the job: a step a batch, and rewards that differ, so that every row is packed.
func ingestDocument(o IngestOptions, source string) map[string]any {
	groups := o.BatchRows / o.GroupSize
	return map[string]any{
		"name": "ingest", "model": map[string]any{"source": source},
		"objective":  map[string]any{"name": "sa_grpo", "group_size": o.GroupSize},
		"batch":      map[string]any{"groups_per_step": groups, "max_tokens_per_micro_batch": ingestMaxTokens, "max_policy_lag": nil},
		"checkpoint": map[string]any{"publish_every_steps": ingestSnapshot, "snapshot_every_steps": ingestSnapshot, "keep_last": 1, "keep_every": 0},
		"sampling":   map[string]any{"max_sequences": 0},
		"limits":     map[string]any{"max_queued_rollouts": ingestAhead * o.BatchRows},
	}
}

// ingestServer is a server on loopback in this process.
type ingestServer struct {
	url, source string
	close       func() error
}

// ingestModel is as small as a model can be: no step computes it.
func ingestModel() model.Config {
	return model.Config{Type: "llama", Vocab: ingestVocab, Hidden: 32, FFN: 64, Layers: 1, Heads: 2, KVHeads: 1, HeadDim: 16,
		MaxPositions: ingestMaxTokens, RopeTheta: 10000, NormEps: 1e-5, Tied: true, InitStd: 0.05, BOS: -1, EOS: []int32{0}}
}

func startIngest(ctx context.Context, o IngestOptions) (_ *ingestServer, err error) {
	var undo []func() error
	s := &ingestServer{close: func() (err error) {
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
		return err
	}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	dir := filepath.Join(o.Dir, "model")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	s.source = "dir:" + dir
	src, err := model.NewRandom(ingestModel(), 1)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	if err := hf.Write(ctx, hf.DirSink(dir), "", src, hf.WriteOptions{}); err != nil {
		return nil, err
	}
	dev, err := cpu.New(1)
	if err != nil {
		return nil, err
	}
	undo = append(undo, dev.Close)
	if err := os.Mkdir(filepath.Join(o.Dir, "store"), 0o755); err != nil {
		return nil, err
	}
	store, err := disk.Open(filepath.Join(o.Dir, "store"))
	if err != nil {
		return nil, err
	}
	undo = append(undo, store.Close)
	manager, err := trainer.NewManager(trainer.Options{Device: dev, DataDir: filepath.Join(o.Dir, "data"), Store: store, Version: "bench", Dry: true})
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		return manager.Close(ctx)
	})
	api := server.New(server.Options{Manager: manager, Version: "bench"})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.url = "http://" + listener.Addr().String()
	hs := api.HTTPServer()
	var served sync.WaitGroup
	served.Go(func() { hs.Serve(listener) })
	undo = append(undo, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		api.Close()
		err := hs.Shutdown(ctx)
		if err != nil {
			hs.Close()
		}
		served.Wait()
		return err
	})
	return s, nil
}

// syncedRate is what the disk takes in MB/s, the way the spool gives it: bodies
// written one after the other to the end of a file, and an fsync after every few.
func syncedRate(dir string, body []byte, each int, least time.Duration) (float64, error) {
	f, err := os.CreateTemp(dir, "rate-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	at, began := int64(0), time.Now()
	for at == 0 || time.Since(began) < least {
		for range each {
			if _, err := f.WriteAt(body, at); err != nil {
				return 0, err
			}
			at += int64(len(body))
		}
		if err := f.Sync(); err != nil {
			return 0, err
		}
	}
	return float64(at) / 1e6 / time.Since(began).Seconds(), nil
}

// used is processor time.
type used struct{ user, system time.Duration }

// processTime is what this process has used, all threads, those of the kernel on its behalf included.
func processTime() used {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err) // only for a bad argument
	}
	return used{time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano())}
}

const rssEvery = 50 * time.Millisecond

// watchRSS samples the resident memory of this process until the returned
// function is called, which gives the samples in MB: the first and the last at
// the calls.
func watchRSS() (stop func() []float64, err error) {
	var samples []float64
	sample := func() error {
		n, err := ProcessRSS(os.Getpid())
		samples = append(samples, float64(n)/1e6)
		return err
	}
	if err := sample(); err != nil {
		return nil, err
	}
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(rssEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				sample()
			case <-end:
				sample()
				return
			}
		}
	}()
	return func() []float64 {
		close(end)
		<-ended
		return samples
	}, nil
}

// Table writes the result for people.
func (r IngestResult) Table(out io.Writer) error {
	t := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintf(t, "sent\t%d rows of %d + %d tokens in bodies of %d rows, %.2f MB; %d at once\n", r.Rows, r.Prompt, r.Completion, r.BatchRows, float64(r.BatchBytes)/1e6, r.Producers)
	fmt.Fprintf(t, "took\t%.1f MB/s, %.0f rows/s, %d steps in %.2f s\n", r.MBs, r.RowsS, r.Steps, r.Seconds)
	fmt.Fprintf(t, "processor\t%.1f MB/s per core; %.2f cores busy, %.0f %% in user code\n", r.MBsCore, r.Cores, 100*r.UserShare)
	fmt.Fprintf(t, "disk\t%.1f MB/s synced after each body, %.1f after each %d: ingest reached %.0f %%\n", r.DiskOneMBs, r.DiskMBs, r.Producers, 100*r.DiskShare)
	fmt.Fprintf(t, "accept\tp50 %.1f, p99 %.1f, max %.1f ms; %d refused with 429\n", 1e3*r.Accept["p50"], 1e3*r.Accept["p99"], 1e3*r.Accept["max"], r.Refused)
	fmt.Fprintf(t, "memory\t%.0f MB at the start, %.0f at most, %.0f at the end; slope %+.2f MB/s\n", r.RSSStartMB, r.RSSPeakMB, r.RSSEndMB, r.RSSSlopeMB)
	fmt.Fprintf(t, "\nstage\tns a byte\tMB/s per core\tbest, ns a byte\t\n")
	for _, s := range r.Stages {
		note := ""
		if !s.InPath {
			note = "not in the sum"
		}
		fmt.Fprintf(t, "%s\t%.3f\t%.0f\t%.3f\t%s\n", s.Stage, s.NsByte, s.MBsCore, s.BestNs, note)
	}
	fmt.Fprintf(t, "receiving and the rest\t%.3f\t\t\t\n", r.RestNs)
	return t.Flush()
}
