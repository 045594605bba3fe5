package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"trainerd/bench"
	"trainerd/internal/fault"
	"trainerd/model"
	"trainerd/model/hf"
)

// loadLimits are what a run is held to.
type loadLimits struct {
	P99    time.Duration // of accept
	Memory float64       // MB that the server may have grown by in the fitted time
}

func newBenchLoad() *cobra.Command {
	o := bench.LoadOptions{}
	limits := loadLimits{}
	var workers, vocab int
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Producers and checkpoint readers against a server; exits 1 if it does not hold",
		Long: `Producers post 1 MB batches with idempotency keys and honour 429; readers wait for
checkpoints, download and verify them. Then what was accepted is held against
what was trained. Without --server a server with a tiny model is started and
ended. A job is made and cancelled. A table goes to stderr, one JSON line to stdout.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.Producers < 1 || o.Readers < 0 || o.Varied < 0 || o.Duration < time.Second {
				return fault.BadField("bench load", fmt.Sprintf("%d producers, %d readers, %d varied groups, %v", o.Producers, o.Readers, o.Varied, o.Duration), "1 or more producers, no negative counts, 1s or more")
			}
			if (o.URL == "") != (o.Source == "") {
				return fault.BadField("source", o.Source, "a model source that the server knows, with --server and only with it")
			}
			o.Vocab = vocab
			o.Token = os.Getenv("TRAINERD_TOKEN")
			stderr := cmd.ErrOrStderr()
			o.Progress = func(text string) { fmt.Fprintln(stderr, text) }
			if o.URL == "" {
				own, err := startLoaded(cmd.Context(), workers)
				if err != nil {
					return err
				}
				defer own.stop()
				o.URL, o.Source, o.Vocab = own.url, own.source, own.vocab
				o.RSS = func() (int64, error) { return bench.ProcessRSS(own.cmd.Process.Pid) }
			}
			res, err := bench.Serving(cmd.Context(), o)
			if err != nil {
				return err
			}
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(res); err != nil {
				return err
			}
			loadTable(stderr, res)
			return limits.check(res)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.URL, "server", "", "base URL of a server; empty: start one")
	f.StringVar(&o.Source, "source", "", "model source of the job, with --server")
	f.IntVar(&vocab, "vocab", 256, "token ids are below it, with --server")
	f.DurationVar(&o.Duration, "duration", 10*time.Minute, "how long producers post")
	f.IntVar(&o.Producers, "producers", 64, "that post at once")
	f.IntVar(&o.Readers, "readers", 16, "of checkpoints")
	f.IntVar(&o.Varied, "varied", 4, "groups of a batch, of 32, whose rewards differ; groups of equal rewards cost no forward pass")
	f.IntVar(&workers, "workers", 1, "CPU workers of the server that is started")
	f.DurationVar(&limits.P99, "p99", 250*time.Millisecond, "most that the 99th percentile of accept may take; 0: not held")
	f.Float64Var(&limits.Memory, "memory", 64, "MB by which the fitted memory of the server may grow after the warm-up; 0: not held")
	return cmd
}

// check names everything that did not hold.
func (l loadLimits) check(res bench.LoadResult) error {
	var err error
	for _, e := range res.Errors {
		err = errors.Join(err, errors.New(e))
	}
	if more := res.ErrorsIn - len(res.Errors); more > 0 {
		err = errors.Join(err, fmt.Errorf("and %d more errors", more))
	}
	if p99 := res.Accept["p99"]; l.P99 > 0 && p99 > l.P99.Seconds() {
		err = errors.Join(err, fmt.Errorf("the 99th percentile of accept is %.0f ms, expected at most %v", 1e3*p99, l.P99))
	}
	if g := res.RSSFit.GrownMB; l.Memory > 0 && g > l.Memory {
		err = errors.Join(err, fmt.Errorf("the server's memory grew by %.0f MB in the fitted time, expected at most %.0f", g, l.Memory))
	}
	if res.Accepted == 0 || res.Readers > 0 && res.ReadsVerified == 0 {
		err = errors.Join(err, fmt.Errorf("%d batches accepted and %d checkpoints read, expected some of both", res.Accepted, res.ReadsVerified))
	}
	return err
}

func loadTable(out io.Writer, r bench.LoadResult) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	ms := func(p map[string]float64) string {
		return fmt.Sprintf("p50 %.0f, p90 %.0f, p99 %.0f, max %.0f ms", 1e3*p["p50"], 1e3*p["p90"], 1e3*p["p99"], 1e3*p["max"])
	}
	fmt.Fprintf(w, "ran\t%.0f s, %d producers, %d readers\n", r.Seconds, r.Producers, r.Readers)
	fmt.Fprintf(w, "accepted\t%d batches of %.2f MB, %d rows: %.1f MB/s, %.0f rows/s\n", r.Accepted, float64(r.BatchBytes)/1e6, r.AcceptedRows, r.AcceptedMBs, r.RowsS)
	fmt.Fprintf(w, "accept\t%s\n", ms(r.Accept))
	fmt.Fprintf(w, "429\t%d, %.1f %% of posts; %s\n", r.Refused, 100*r.RefusedShare, ms(r.Refuse))
	fmt.Fprintf(w, "trained\t%d rows in %d steps, refused %v; %d of %d groups of a batch vary; drained in %.1f s\n", r.TrainedRows, r.Steps, r.RefusedRows, r.Varied, bench.LoadGroups, r.DrainS)
	fmt.Fprintf(w, "checkpoints\t%d read and verified, %.0f MB, %d gone meanwhile; %s\n", r.ReadsVerified, r.ReadMB, r.ReadsGone, ms(r.Read))
	fmt.Fprintf(w, "memory\tmean %.0f MB after %.0f s, slope %+.2f MB/min, grown %+.1f MB\n", r.RSSFit.MeanMB, r.RSSFit.WarmUp, r.RSSFit.SlopeMB, r.RSSFit.GrownMB)
	fmt.Fprintf(w, "errors\t%d\n", r.ErrorsIn)
	w.Flush()
}

// loadedServer is a `trainerd serve` of this executable with a tiny model, for one run.
type loadedServer struct {
	cmd    *exec.Cmd
	dir    string
	url    string
	source string
	vocab  int
	log    *bytes.Buffer
}

func startLoaded(ctx context.Context, workers int) (_ *loadedServer, err error) {
	dir, err := os.MkdirTemp("", "trainerd-load-")
	if err != nil {
		return nil, err
	}
	s := &loadedServer{dir: dir, source: "dir:" + filepath.Join(dir, "model"), log: &bytes.Buffer{}}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	cfg := model.Config{Type: "llama", Vocab: 256, Hidden: 32, FFN: 64, Layers: 1, Heads: 2, KVHeads: 1, HeadDim: 16,
		MaxPositions: 2048, RopeTheta: 10000, NormEps: 1e-5, Tied: true, InitStd: 0.05, BOS: -1, EOS: []int32{0}}
	s.vocab = cfg.Vocab
	src, err := model.NewRandom(cfg, 1)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	if err := os.Mkdir(filepath.Join(dir, "model"), 0o755); err != nil {
		return nil, err
	}
	if err := hf.Write(ctx, hf.DirSink(filepath.Join(dir, "model")), "", src, hf.WriteOptions{}); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s.cmd = exec.Command(self, "serve", "--listen", "127.0.0.1:0", "--data", filepath.Join(dir, "data"), "--device", "cpu", "--workers", fmt.Sprint(workers))
	s.cmd.Stderr = s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	var hello struct{ Addr string }
	if err != nil || json.Unmarshal([]byte(line), &hello) != nil || hello.Addr == "" {
		return nil, fmt.Errorf("start a server: it said %q\n%s", line, s.log)
	}
	s.url = "http://" + hello.Addr
	return s, nil
}

func (s *loadedServer) stop() {
	if s.cmd != nil && s.cmd.Process != nil {
		s.cmd.Process.Signal(syscall.SIGKILL)
		s.cmd.Wait()
	}
	os.RemoveAll(s.dir)
}
