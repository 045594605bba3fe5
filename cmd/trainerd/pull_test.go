package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"trainerd/client"
)

// script writes a shell script that can be run.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "reload.sh")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPullExec: the program sees the checkpoint and not the token; its failure
// and its time are the command's.
func TestPullExec(t *testing.T) {
	p, c := boot(t, nil)
	j := newJob(t, c)
	t.Setenv("TRAINERD_TOKEN", "a-secret")
	dir := filepath.Join(t.TempDir(), "policy")
	out := filepath.Join(t.TempDir(), "env")
	ok := script(t, `echo "$@" > `+out+`; env | grep ^TRAINERD_ | sort >> `+out+`; ls "$TRAINERD_DIR" >> `+out+"\n")
	if _, _, err := command(t, "pull", "--server", p.URL(), "--exec", ok, j.ID, dir, "--", "--one", "two words; $HOME"); err != nil {
		t.Fatal(err)
	}
	m, err := c.Checkpoint(t.Context(), j.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := m.Digest()
	if err != nil {
		t.Fatal(err)
	}
	got := string(read(t, out))
	for _, line := range []string{"--one two words; $HOME", "TRAINERD_DIGEST=" + digest, "TRAINERD_DIR=" + dir, "TRAINERD_JOB=" + j.ID, "TRAINERD_STEP=0",
		"TRAINERD_PREFIX=" + m.Prefix, "TRAINERD_SERVER=" + p.URL(), "config.json", "model.safetensors"} {
		if !strings.Contains("\n"+got, "\n"+line+"\n") {
			t.Errorf("the program saw no %s:\n%s", line, got)
		}
	}
	if strings.Contains(got, "TOKEN") || strings.Contains(got, "a-secret") {
		t.Errorf("the program saw the token:\n%s", got)
	}
	_, _, err = command(t, "pull", "--server", p.URL(), "--exec", script(t, "echo the engine is away >&2; exit 3\n"), j.ID, dir)
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "the engine is away") {
		t.Errorf("a program that fails: %v", err)
	}
	began := time.Now()
	_, _, err = command(t, "pull", "--server", p.URL(), "--exec", script(t, "sleep 600 & sleep 600\n"), "--exec-timeout", "300ms", j.ID, dir)
	if err == nil || !strings.Contains(err.Error(), "300ms") || time.Since(began) > 100*time.Second {
		t.Errorf("a program that hangs: %v after %v", err, time.Since(began))
	}
	for _, tc := range []struct {
		args []string
		says string
	}{
		{[]string{"--exec", "/no/such/program", j.ID, dir}, "no such file"},
		{[]string{j.ID, dir, "three"}, "after --"},
		{[]string{j.ID, dir, "--", "x"}, "--exec"},
		{[]string{"--follow", "--step", "3", j.ID, dir}, "--step"},
		{[]string{"--interval", "3s", j.ID, dir}, "--follow"},
		{[]string{"--exec-timeout", "3s", j.ID, dir}, "--exec"},
		{[]string{"--follow", "--report", "1ms", j.ID, dir}, "--report"},
	} {
		if _, _, err := command(t, append([]string{"pull", "--server", p.URL()}, tc.args...)...); err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v: %v", tc.args, err)
		}
	}
}

// TestPullFollow: each step reaches the program, a failing one is reported while
// the old step counts as served, and the end ends a running program.
func TestPullFollow(t *testing.T) {
	p, c := boot(t, nil)
	j := newJob(t, c)
	dir, flag, log := filepath.Join(t.TempDir(), "policy"), filepath.Join(t.TempDir(), "fail"), filepath.Join(t.TempDir(), "log")
	hang := filepath.Join(t.TempDir(), "hang")
	reload := script(t, `[ -e `+hang+` ] && { echo hanging >> `+log+`; trap 'echo ended >> `+log+`; exit 1' TERM; while :; do sleep 0.05; done; }
[ -e `+flag+` ] && { echo no memory; exit 1; }
echo "step $TRAINERD_STEP" >> `+log+"\n")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	follow, stop := context.WithCancel(ctx)
	defer stop()
	root := newRoot()
	var mu sync.Mutex
	var said bytes.Buffer
	root.SetArgs([]string{"pull", "--follow", "--server", p.URL(), "--exec", reload, "--node", "n1", "--report", "1s", "--delta", j.ID, dir})
	root.SetOut(&said)
	root.SetErr(&lockedWriter{mu: &mu, w: &said})
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(follow) }()
	until := func(what string, cond func(client.Node) bool) {
		t.Helper()
		var last []client.Node
		for {
			var err error
			if last, err = c.Nodes(ctx, j.ID); err == nil && len(last) == 1 && cond(last[0]) {
				return
			}
			select {
			case <-ctx.Done():
				mu.Lock()
				defer mu.Unlock()
				t.Fatalf("%s: not in time; %+v\n%s", what, last, said.String())
			case err := <-ended:
				t.Fatalf("%s: it ended: %v", what, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	until("step 0", func(n client.Node) bool { return n.Name == "n1" && n.Step == 0 && n.State == "serving" })
	write(t, flag, nil)
	if _, err := c.Submit(ctx, j.ID, pairs("g", 1), ""); err != nil {
		t.Fatal(err)
	}
	until("a failure", func(n client.Node) bool {
		return n.State == "failed" && n.Step == 0 && n.LagSteps == 1 && strings.Contains(n.Message, "no memory")
	})
	if err := os.Remove(flag); err != nil {
		t.Fatal(err)
	}
	until("step 1", func(n client.Node) bool { return n.Step == 1 && n.State == "serving" && n.LagSteps == 0 })
	write(t, hang, nil)
	if _, err := c.Submit(ctx, j.ID, pairs("h", 1), ""); err != nil {
		t.Fatal(err)
	}
	for !strings.Contains(readAny(log), "hanging") {
		if ctx.Err() != nil {
			t.Fatal("the program did not run")
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("a stop is an error: %v", err)
	}
	if got := readAny(log); !strings.HasSuffix(got, "hanging\nended\n") || !strings.HasPrefix(got, "step 0\nstep 1\n") {
		t.Errorf("the program ran so:\n%s", got)
	}
	all, err := c.Nodes(ctx, j.ID)
	if err != nil || len(all) != 1 || all[0].State != "stopped" || all[0].Step != 1 {
		t.Errorf("%+v, %v", all, err)
	}
}

func readAny(path string) string {
	raw, _ := os.ReadFile(path)
	return string(raw)
}

type lockedWriter struct {
	mu *sync.Mutex
	w  *bytes.Buffer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
