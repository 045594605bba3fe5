package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/rollout"
	"trainerd/storage"
	"trainerd/storage/disk"
)

// envMain, when set, makes this test binary the program.
const envMain = "TRAINERD_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(envMain) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// process is `trainerd serve` as a process of its own.
type process struct {
	cmd   *exec.Cmd
	URL   string
	ended chan struct{}
	err   error // of Wait, once ended is closed

	mu  sync.Mutex
	log bytes.Buffer
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *process) text() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// spawn starts a server on a data directory and waits until it listens.
func spawn(t *testing.T, data string, env []string, flags ...string) *process {
	t.Helper()
	p := &process{ended: make(chan struct{})}
	p.cmd = exec.Command(os.Args[0], append([]string{"--json", "serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--workers", "1", "--data", data}, flags...)...)
	p.cmd.Env = append(append(os.Environ(), envMain+"=1"), env...)
	p.cmd.Stderr = p
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	first := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		first <- line
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() { p.cmd.Process.Kill(); <-p.ended })
	var hello struct{ Addr string }
	if line := <-first; json.Unmarshal([]byte(line), &hello) != nil || hello.Addr == "" {
		t.Fatalf("it does not listen: %q\n%s", line, p.text())
	}
	p.URL = "http://" + hello.Addr
	return p
}

// wait waits for the end and returns the exit status, or -1 and the signal that ended it.
func (p *process) wait(t *testing.T, most time.Duration) (int, syscall.Signal) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(most):
		t.Fatalf("it has not ended after %v:\n%s", most, p.text())
	}
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) {
		return 0, 0
	}
	status := exit.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		return -1, status.Signal()
	}
	return status.ExitStatus(), 0
}

func (p *process) client(t *testing.T) *client.Client {
	t.Helper()
	c, err := client.New(p.URL, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// slowGroup is a batch of one group that makes a step of a second or more:
// slowRows micro-batches of 480 tokens.
func slowGroup(name string) *rollout.Batch {
	b := &rollout.Batch{HasReward: true}
	for i := range slowRows {
		b.Rollouts = append(b.Rollouts, rollout.Rollout{GroupID: name, Prompt: slices.Repeat([]int32{1, 2, 3}, 80),
			Completion: slices.Repeat([]int32{5, 6, int32(i % 7)}, 80), Reward: float64(i % 2)})
	}
	return b
}

const slowRows = 512

// training starts a job on a slow step and returns it once the step runs.
func training(t *testing.T, p *process) client.Job {
	t.Helper()
	c := p.client(t)
	j, err := c.CreateJob(t.Context(), map[string]any{"model": map[string]any{"source": "dir:" + tinyModel(t)},
		"objective": map[string]any{"group_size": slowRows}, "batch": map[string]any{"groups_per_step": 1, "max_tokens_per_micro_batch": 512},
		"checkpoint": map[string]any{"snapshot_every_steps": 1000},
		"sampling":   map[string]any{"max_sequences": 0, "max_tokens": 0}}, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.PolicyStep == 0 || j.Final() }); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Submit(t.Context(), j.ID, slowGroup("g"), ""); err != nil {
		t.Fatal(err)
	}
	j, err = c.Wait(t.Context(), j.ID, time.Millisecond, func(j client.Job) bool { return j.State == "training" || j.Step > 0 || j.Final() })
	if err != nil || j.State != "training" || j.Step != 0 {
		t.Fatalf("the step does not run: %s at step %d, %v", j.State, j.Step, err)
	}
	return j
}

// trained starts the server again, and holds it to have trained the one group
// exactly once, in one step.
func trained(t *testing.T, data, job string) client.Step {
	t.Helper()
	p := spawn(t, data, nil)
	c := p.client(t)
	j, err := c.Wait(t.Context(), job, 5*time.Millisecond, func(j client.Job) bool { return j.State == "waiting" && j.Step == 1 || j.Final() })
	if err != nil || j.Step != 1 || j.Counts.GroupsTrained != 1 || j.Queue.Rollouts != 0 {
		t.Fatalf("%s at step %d, %+v %+v, %v\n%s", j.State, j.Step, j.Counts, j.Queue, err, p.text())
	}
	steps, err := c.Steps(t.Context(), job, 0)
	if err != nil || len(steps) != 1 {
		t.Fatalf("%d steps, %v", len(steps), err)
	}
	return steps[0]
}

func (p *process) signal(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}

// TestStopFinishesTheStep: after SIGTERM /readyz says 503 first while the API
// answers on; then the step ends, its policy and the optimizer state are in a
// checkpoint, and the exit status is 0. The next start has nothing to repeat.
func TestStopFinishesTheStep(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	p := spawn(t, data, nil, "--drain", "500ms")
	j := training(t, p)
	c := p.client(t)
	told := time.Now()
	p.signal(t)
	get := func(path string) int {
		res, err := http.Get(p.URL + path)
		if err != nil {
			t.Fatalf("%s while it drains: %v", path, err)
		}
		res.Body.Close()
		return res.StatusCode
	}
	for get("/readyz") != http.StatusServiceUnavailable {
		time.Sleep(time.Millisecond)
	}
	if _, err := c.Job(t.Context(), j.ID); err != nil {
		t.Errorf("the API while it drains: %v", err)
	}
	if got := get("/healthz"); got != http.StatusOK {
		t.Errorf("/healthz while it drains: %d", got)
	}
	if status, sig := p.wait(t, 65*time.Second); status != 0 {
		t.Fatalf("exit status %d, signal %v\n%s", status, sig, p.text())
	}
	// Whole on disk before anything starts again:
	latest := newestCheckpoint(t, filepath.Join(data, "store"), j.ID)
	if latest.Step != 1 || !latest.Snapshot {
		t.Errorf("the newest checkpoint is of step %d, snapshot %v", latest.Step, latest.Snapshot)
	}
	if rec := trained(t, data, j.ID); rec.Time.Before(told.Add(500 * time.Millisecond)) {
		t.Errorf("the step ended %v after the signal: while it drained, which shows nothing", rec.Time.Sub(told))
	} else {
		t.Logf("the step of %.2f s ended %v after the signal", rec.WallTime, rec.Time.Sub(told))
	}
}

// TestStopOutOfTime: a step that is longer than the time to stop is cut short,
// the exit status says so, and the next start repeats it.
func TestStopOutOfTime(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	p := spawn(t, data, nil, "--shutdown", "50ms")
	j := training(t, p)
	p.signal(t)
	status, sig := p.wait(t, 30*time.Second)
	if status != 1 || !strings.Contains(p.text(), "deadline exceeded") {
		t.Fatalf("exit status %d, signal %v\n%s", status, sig, p.text())
	}
	if latest := newestCheckpoint(t, filepath.Join(data, "store"), j.ID); latest.Step != 0 {
		t.Errorf("the newest checkpoint is of step %d: the step was not cut short", latest.Step)
	}
	trained(t, data, j.ID)
}

// TestSecondSignal: a second SIGTERM ends the process at once, and loses nothing.
func TestSecondSignal(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	p := spawn(t, data, nil, "--drain", "1h")
	j := training(t, p)
	p.signal(t)
	for !strings.Contains(p.text(), `"msg":"stopping"`) { // the first one was understood
		time.Sleep(time.Millisecond)
	}
	p.signal(t)
	if status, sig := p.wait(t, 10*time.Second); status != -1 || sig != syscall.SIGTERM {
		t.Fatalf("exit status %d, signal %v", status, sig)
	}
	trained(t, data, j.ID)
}

// TestSystemdIsTold listens as systemd does.
func TestSystemdIsTold(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), fmt.Sprintf("@trainerd-test-%d", os.Getpid())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		states := make(chan string, 1024)
		go func() {
			defer close(states)
			buf := make([]byte, 4096)
			for {
				n, err := l.Read(buf)
				if err != nil {
					return
				}
				states <- string(buf[:n])
			}
		}()
		await := func(want string) {
			t.Helper()
			for until := time.After(30 * time.Second); ; {
				select {
				case s := <-states:
					if slices.Contains(strings.Split(s, "\n"), want) {
						return
					}
				case <-until:
					t.Fatalf("%s did not come", want)
				}
			}
		}
		p := spawn(t, filepath.Join(t.TempDir(), "data"), []string{"NOTIFY_SOCKET=" + name, "WATCHDOG_USEC=20000"})
		await("READY=1")
		for range 3 {
			await("WATCHDOG=1")
		}
		p.signal(t)
		await("STOPPING=1")
		if status, sig := p.wait(t, 65*time.Second); status != 0 {
			t.Errorf("exit status %d, signal %v", status, sig)
		}
		l.Close()
	}
}

func TestSupervised(t *testing.T) {
	for _, tc := range []struct {
		env  map[string]string
		want supervisor
		bad  bool
	}{
		{nil, supervisor{}, false},
		{map[string]string{"WATCHDOG_USEC": "5"}, supervisor{}, false},
		{map[string]string{"NOTIFY_SOCKET": "/x"}, supervisor{socket: "/x"}, false},
		{map[string]string{"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000"}, supervisor{"/x", 3 * time.Second}, false},
		{map[string]string{"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, supervisor{socket: "/x"}, false},
		{map[string]string{"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"}, supervisor{socket: "/x"}, true},
	} {
		got, err := supervised(func(name string) string { return tc.env[name] })
		if got != tc.want || (err != nil) != tc.bad {
			t.Errorf("%v: %+v, %v", tc.env, got, err)
		}
	}
}

// newestCheckpoint reads a store that no server has open.
func newestCheckpoint(t *testing.T, dir, job string) storage.Manifest {
	t.Helper()
	store, err := disk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	man, err := storage.Checkpoints{Blob: store}.Latest(t.Context(), job)
	if err != nil {
		t.Fatal(err)
	}
	return man
}
