package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"trainerd/client"
)

// execGrace is how long a program that was told to end may take before it is killed.
const execGrace = 10 * time.Second

// command returns what runs the program for a checkpoint. Program and children
// are a process group of their own: at a timeout or the context's end it gets
// SIGTERM and, execGrace later, SIGKILL. What it prints goes to stderr; the last
// of it is part of the error when it fails.
func (p *puller) command(con console, extra []string) func(context.Context, client.Checkpoint) error {
	return func(ctx context.Context, at client.Checkpoint) error {
		limited, cancel := context.WithTimeout(ctx, p.timeout)
		defer cancel()
		last := &tail{w: con.err}
		cmd := exec.CommandContext(limited, p.program, extra...)
		cmd.Env = append(withoutToken(os.Environ()), "TRAINERD_JOB="+at.Job, "TRAINERD_STEP="+strconv.FormatInt(at.Step, 10), "TRAINERD_DIR="+at.Dir,
			"TRAINERD_DIGEST="+at.Digest, "TRAINERD_PREFIX="+at.Prefix, "TRAINERD_SERVER="+p.url)
		cmd.Stdout, cmd.Stderr = last, last
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
		cmd.WaitDelay = execGrace
		err := cmd.Run()
		if cmd.Process != nil && limited.Err() != nil {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what did not listen
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case limited.Err() != nil:
			return fmt.Errorf("%s: ended after %v%s", filepath.Base(p.program), p.timeout, last.text())
		case errors.Is(err, exec.ErrWaitDelay): // it succeeded and left something behind that holds its output
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w%s", filepath.Base(p.program), err, last.text())
		}
		return nil
	}
}

// withoutToken keeps the server's token from programs.
func withoutToken(env []string) []string {
	var out []string
	for _, e := range env {
		if !strings.HasPrefix(e, "TRAINERD_TOKEN=") {
			out = append(out, e)
		}
	}
	return out
}

// tail passes text on and keeps the last of it.
type tail struct {
	w io.Writer

	mu   sync.Mutex
	last []byte
}

const tailBytes = 500

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, p...)
	if over := len(t.last) - tailBytes; over > 0 {
		t.last = append(t.last[:0], t.last[over:]...)
	}
	return t.w.Write(p)
}

func (t *tail) text() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if text := strings.TrimSpace(string(t.last)); text != "" {
		return ": " + strings.ToValidUTF8(text, "?")
	}
	return ""
}

func absolute(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		return abs
	}
	return dir
}
