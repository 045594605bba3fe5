//go:build crashpoints

package crashtest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"trainerd/internal/crashpoint"
	"trainerd/kernels/cpu"
	"trainerd/server"
	"trainerd/storage/disk"
	"trainerd/trainer"
)

// envServe, when set, makes this test binary the server that a run kills: its
// value is a serverConfig.
const envServe = "CRASHTEST_SERVE"

// serverConfig says what the server is made of.
type serverConfig struct {
	Root         string // of everything durable: data and store lie below it
	Listen       string
	SegmentBytes int64
	QueuedRows   int
}

func TestMain(m *testing.M) {
	if raw := os.Getenv(envServe); raw != "" {
		if err := serve(raw); err != nil {
			fmt.Fprintln(os.Stderr, "serve:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serve is the server of cmd/trainerd without its flags: the same manager, store
// and HTTP routes on the CPU device. It ends by being killed.
func serve(raw string) error {
	listening := crashpoint.Enter(crashpoint.Boot)
	var cfg serverConfig
	if err := json.Unmarshal([]byte(raw), &cfg); err != nil {
		return err
	}
	store, err := disk.Open(filepath.Join(cfg.Root, "store"))
	if err != nil {
		return err
	}
	dev, err := cpu.New(1)
	if err != nil {
		return err
	}
	m, err := trainer.NewManager(trainer.Options{Device: dev, DataDir: filepath.Join(cfg.Root, "data"), Store: store, Version: "crashtest",
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Limits: trainer.Limits{SegmentBytes: cfg.SegmentBytes, MaxQueuedRollouts: cfg.QueuedRows}})
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	listening()
	return server.New(server.Options{Manager: m, Version: "crashtest"}).HTTPServer().Serve(l)
}

// process is a server that runs.
type process struct {
	cmd    *exec.Cmd
	log    *bytes.Buffer
	phases string
	ended  chan struct{}
	err    error // of Wait; once ended is closed
}

// start runs the server. at is a point and its count ("" for none), off what is
// left out; with power it keeps the image that a power cut needs.
func start(cfg serverConfig, scratch, at, off string, power bool) (*process, error) {
	raw, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	p := &process{log: &bytes.Buffer{}, phases: filepath.Join(scratch, "phases"), ended: make(chan struct{})}
	if err := os.WriteFile(p.phases, make([]byte, 4*(crashpoint.Phases+1)), 0o644); err != nil {
		return nil, err
	}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), envServe+"="+string(raw), crashpoint.EnvPhases+"="+p.phases, crashpoint.EnvAt+"="+at,
		crashpoint.EnvOff+"="+off, "GOMAXPROCS=2")
	if power {
		p.cmd.Env = append(p.cmd.Env, crashpoint.EnvShadow+"="+filepath.Join(scratch, "shadow"))
	}
	p.cmd.Stderr = p.log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.err = p.cmd.Wait(); close(p.ended) }()
	return p, nil
}

// active says which phases the process is in, or was in when it died.
func (p *process) active() (in [crashpoint.Phases + 1]bool, err error) {
	raw, err := os.ReadFile(p.phases)
	if err != nil {
		return in, err
	}
	for i := range in {
		in[i] = binary.NativeEndian.Uint32(raw[4*i:]) > 0
	}
	return in, nil
}

// working waits until the process is past its start and has begun to write or
// to train, died, or has nothing to do.
func (p *process) working(done func() bool) {
	begun := false
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && !done(); time.Sleep(time.Millisecond) {
		select {
		case <-p.ended:
			return
		default:
		}
		in, err := p.active()
		starting := in[crashpoint.Boot] || in[crashpoint.Load] || in[crashpoint.Replay]
		if err == nil && begun && !starting && slices.Contains(in[:crashpoint.Load], true) {
			return
		}
		begun = begun || starting
	}
}

// death is how a process ended.
type death struct {
	phase crashpoint.Phase
	point bool // an injected point killed it
}

// kill kills the process, if no point has done so, and says what it was doing.
func (p *process) kill() (death, error) {
	p.cmd.Process.Signal(syscall.SIGKILL) // fails when it is dead already
	<-p.ended
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		text := p.log.String()
		if lines := strings.Split(text, "\n"); len(lines) > 40 {
			text = strings.Join(lines[len(lines)-40:], "\n")
		}
		return death{}, fmt.Errorf("the server ended by itself: %v\n%s", p.err, text)
	}
	in, err := p.active()
	d := death{phase: crashpoint.Phases, point: in[crashpoint.Phases]}
	for phase := range crashpoint.Phases {
		if in[phase] {
			d.phase = phase
			break
		}
	}
	return d, err
}

// address picks a free port of loopback.
func address() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
