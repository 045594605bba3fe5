package field

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// The roles that this executable plays when it is started again; argv[0] says which.
const (
	rolePrefix = "secloop-field-"
	roleWorker = rolePrefix + "worker"
	roleBlue   = rolePrefix + "blue"
	roleRed    = rolePrefix + "red"
	roleLogin  = rolePrefix + "login" // becomes sshd
)

// needed is what a kernel must be able to do for a field to open.
var needed = []scenario.Effect{
	{Rule: &scenario.Rule{Src: scenario.Forged(0)}},
	{Rule: &scenario.Rule{Src: scenario.Forged(0), PerSource: 1}},
	{Shape: &scenario.Shape{Src: scenario.TrustedWWW, Rate: 8000, Burst: scenario.UploadBurst}},
}

const episodeTimeout = 90 * time.Second

var hooked bool // Main was called

// Main plays the role that this process was started for and exits; in a process
// that was started for something else it returns at once. It must be the first
// call of main (or of TestMain).
func Main() {
	hooked = true
	roles := map[string]func() error{roleWorker: worker, roleBlue: blueRole, roleRed: redRole, roleLogin: loginRole}
	play, ok := roles[os.Args[0]]
	if !ok {
		return
	}
	if err := play(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[0], err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Options of a field.
type Options struct {
	Parallel int            // episodes at a time; 0 means the number of CPUs
	Real     bool           // data stores are Debian's redis-server and the remote login its sshd instead of ours
	Pace     time.Duration  // how long the chain of a played episode takes at least, its stages spread evenly; 0 for as fast as it goes
	Fault    scenario.Fault // put into every episode, for tests
	Canary   []string       // addresses that red and blue try to reach in every episode, for tests: an episode that reaches one fails
}

// Field starts and ends battle-fields. It is safe for concurrent use.
type Field struct {
	opts   Options
	slots  chan struct{}
	starts chan startRequest
	warm   chan *workerProcess // workers that are ready for an episode
	done   chan struct{}       // closed by Close
	wg     sync.WaitGroup      // of the starter
	work   sync.WaitGroup      // of those who start and end workers
	groups cgroups
}

type startRequest struct {
	cmd  *exec.Cmd
	done chan error
}

// Open checks that battle-fields can be made here by making one, and says what
// is missing where they cannot.
func Open(o Options) (*Field, error) {
	if !hooked {
		return nil, fault.New(fault.Internal, "no_hook", "open battle-field: field.Main was not called first in main")
	}
	if o.Parallel <= 0 {
		o.Parallel = runtime.NumCPU()
	}
	for _, program := range []string{redisServer, sshdPath, perlPath} {
		if _, err := os.Stat(program); o.Real && err != nil {
			return nil, fault.New(fault.Unavailable, "no_program", "open battle-field with real services: %w", err)
		}
	}
	f := &Field{opts: o, slots: make(chan struct{}, o.Parallel), starts: make(chan startRequest), warm: make(chan *workerProcess), done: make(chan struct{}), groups: openCgroups()}
	f.wg.Add(1)
	go f.starter()
	w, err := f.start()
	if err == nil {
		err = w.peer.call("check", needed, nil)
		w.end()
	}
	if err != nil {
		f.Close()
		return nil, fault.New(fault.Unavailable, "no_namespaces",
			"open battle-field: this process may not make namespaces (needs root or CAP_SYS_ADMIN, CAP_NET_ADMIN, veth, nftables with socket and connlimit, and of tc tbf, htb and u32); use secloop/sim: %w", err)
	}
	for range warmers(o.Parallel) {
		f.work.Go(f.warmer)
	}
	return f, nil
}

// warmers is how many workers are being made ready, or wait ready, while others play.
func warmers(parallel int) int { return 1 + parallel/4 }

// warmer makes workers ready ahead of the episodes that will need them. A
// worker that cannot be started is left to the episode to find out.
func (f *Field) warmer() {
	for {
		w, err := f.start()
		if err == nil {
			if err = w.peer.call("ready", nil, nil); err != nil {
				w.end()
			}
		}
		if err != nil {
			select {
			case <-f.done:
				return
			case <-time.After(time.Second):
				continue
			}
		}
		select {
		case f.warm <- w:
		case <-f.done:
			w.end()
			return
		}
	}
}

// worker returns one that is ready, or starts one.
func (f *Field) worker() (*workerProcess, error) {
	select {
	case w := <-f.warm:
		return w, nil
	default:
		return f.start()
	}
}

// Close waits for running episodes and ends the supervisor.
func (f *Field) Close() error {
	for range cap(f.slots) {
		f.slots <- struct{}{}
	}
	close(f.done)
	f.work.Wait()
	close(f.starts)
	f.wg.Wait()
	f.groups.close()
	return nil
}

// starter starts workers from one thread that lives as long as the field:
// Pdeathsig is sent when the thread dies that started the child.
func (f *Field) starter() {
	defer f.wg.Done()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for q := range f.starts {
		q.done <- q.cmd.Start()
	}
}

// Run implements secloop.Battlefield.
func (f *Field) Run(ctx context.Context, a secloop.Alert, s secloop.Strategy) (secloop.Feedback, error) {
	out, err := f.Play(ctx, a, s)
	return out.Feedback, err
}

// episode is what the supervisor tells a worker.
type episode struct {
	Episode  scenario.Episode
	Strategy secloop.Strategy
	Pace     time.Duration
	Canary   []string
}

// Play runs one episode on a field of its own and says everything about it.
func (f *Field) Play(ctx context.Context, a secloop.Alert, s secloop.Strategy) (scenario.Outcome, error) {
	var out scenario.Outcome
	ep, err := scenario.New(a)
	if err != nil {
		return out, err
	}
	ep.Fault, ep.Real = f.opts.Fault, f.opts.Real
	if err := f.on(ctx, "play", episode{ep, s, f.opts.Pace, f.opts.Canary}, &out); err != nil {
		return out, fmt.Errorf("run battle-field: %w", err)
	}
	return out, nil
}

// on asks a worker of its own and ends it.
func (f *Field) on(ctx context.Context, op string, arg, val any) error {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	w, err := f.worker()
	if err != nil {
		return fault.New(fault.Unavailable, "no_worker", "start worker: %w", err)
	}
	defer f.work.Go(w.end) // what the kernel takes to clear away is nobody's wait
	ctx, cancel := context.WithTimeout(ctx, episodeTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, w.kill)()
	if err := w.peer.call(op, arg, val); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		w.kill()
		return fmt.Errorf("%w%s", err, w.said())
	}
	return nil
}

// Observe plays an incident's chain against an undefended clone among background
// noise and returns what the sensor in blue's namespace raised.
func (f *Field) Observe(ctx context.Context, a secloop.Alert, seed uint64) ([]sensor.Alert, error) {
	ep, err := scenario.New(a)
	if err != nil {
		return nil, err
	}
	ep.Fault, ep.Real = f.opts.Fault, f.opts.Real
	var got watched
	if err := f.on(ctx, "observe", observation{ep, seed, f.opts.Canary}, &got); err != nil {
		return nil, fmt.Errorf("observe incident: %w", err)
	}
	if got.Lost > 0 {
		return nil, fault.New(fault.Unavailable, "sensor_lost", "observe incident: the sensor lost %d packets", got.Lost)
	}
	return got.Alerts, nil
}

// observation is what the supervisor tells a worker that watches, and watched what comes back.
type observation struct {
	Episode scenario.Episode
	Seed    uint64
	Canary  []string
}

type watched struct {
	Alerts []sensor.Alert
	Lost   int
}

// workerProcess is a running worker, seen from the host.
type workerProcess struct {
	cmd    *exec.Cmd
	peer   *peer
	stdin  *os.File
	stdout *os.File
	stderr *tail
	group  string
	groups cgroups
	once   sync.Once
}

func (f *Field) start() (*workerProcess, error) {
	inR, inW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		inR.Close()
		inW.Close()
		return nil, err
	}
	w := &workerProcess{stdin: inW, stdout: outR, stderr: &tail{}, groups: f.groups}
	w.cmd = again(roleWorker, inR, outW, w.stderr)
	w.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	q := startRequest{w.cmd, make(chan error, 1)}
	f.starts <- q
	err = <-q.done
	inR.Close()
	outW.Close()
	if err != nil {
		inW.Close()
		outR.Close()
		return nil, err
	}
	w.peer = newPeer(inW, outR)
	w.group = f.groups.enter(w.cmd.Process.Pid)
	return w, nil
}

// tag says whose a process is: "of-" and the supervisor's process id, handed down.
func tag() string {
	if len(os.Args) == 2 && strings.HasPrefix(os.Args[0], rolePrefix) {
		return os.Args[1]
	}
	return fmt.Sprintf("of-%d", os.Getpid())
}

// again is this executable, started for a role with an empty environment.
func again(role string, stdin, stdout *os.File, stderr *tail) *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{role, tag()}, Env: []string{"GOMAXPROCS=1", "GOGC=off", "GOMEMLIMIT=128MiB"}, Dir: "/",
		Stdin: stdin, Stdout: stdout, Stderr: stderr,
	}
}

func (w *workerProcess) kill() { w.cmd.Process.Kill() }

// end kills the worker, and with it everything in its namespaces, and waits.
func (w *workerProcess) end() {
	w.once.Do(func() {
		w.kill()
		w.stdin.Close()
		w.stdout.Close()
		w.cmd.Wait()
		w.groups.leave(w.group)
	})
}

// said is what the worker wrote to its standard error, for an error text.
func (w *workerProcess) said() string {
	w.end()
	if text := w.stderr.String(); text != "" {
		return ": " + text
	}
	return ""
}

// tail keeps the first 2 KiB that are written.
type tail struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b.Write(p[:min(len(p), max(0, 2048-t.b.Len()))])
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}
