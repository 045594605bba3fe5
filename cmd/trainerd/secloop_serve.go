package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trainerd/internal/fault"
	"trainerd/secloop/loop"
)

func newSecloopServe() *cobra.Command {
	l := &loopEnv{}
	s := byteSettings()
	s.Temperature = 0
	r := &loop.Responder{PerHour: 60, Waiting: 16, Timeout: time.Minute}
	var listen, job, callers, apply, targetKey string
	var targets []string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Answer alerts with strategies: a webhook in, a strategy out",
		Long: "POST /v1/alerts takes {\"alerts\": [...]}, {\"summaries\": [...]} or Suricata's EVE lines (application/x-ndjson) and answers\n" +
			"with a strategy, each call checked. Nothing is applied unless --apply names a --target; tools that stop a service are not\n" +
			"applied without --allow-harmful. Beyond loopback callers must show the token of --callers-token-file.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			l.con = newLoopConsole(cmd)
			ctx := cmd.Context()
			if callers != "" {
				raw, err := os.ReadFile(callers)
				if err != nil {
					return err
				}
				if r.Token = strings.TrimSpace(string(raw)); len(r.Token) < 16 {
					return fault.BadField("callers-token-file", callers, "a file with a token of at least 16 characters")
				}
			}
			if err := guarded(listen, r.Token); err != nil {
				return err
			}
			if err := chooseTarget(r, apply, targets, targetKey); err != nil {
				return err
			}
			dir, err := os.MkdirTemp("", "trainerd-secloop-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			p, err := l.openPolicy(ctx, dir, 1)
			if err != nil {
				return err
			}
			if r.Agent, err = l.agent(p, nil, s.MaxTokens, s.Temperature); err != nil {
				return err
			}
			if r.Agent.Sampler == nil {
				if err := l.connect(ctx, dir); err != nil {
					return err
				}
				defer l.stop()
				if job != "" {
					if l.server == "" {
						return fault.BadField("job", job, "--server, whose job it is")
					}
					r.Agent.Sampler = loop.ServerSampler{Client: l.client, Job: job, MaxTokens: s.MaxTokens, Temperature: s.Temperature}
				} else if r.Agent.Sampler, err = loop.SampleOnly(ctx, l.client, p.source, 4, s); err != nil {
					return err
				}
			}
			r.Most = s.Most
			if r.Dir != "" {
				if err := os.MkdirAll(r.Dir, 0o755); err != nil {
					return err
				}
			}
			return serveResponder(ctx, l.con, listen, r)
		},
	}
	f := cmd.Flags()
	f.StringVar(&listen, "listen", "127.0.0.1:8090", "address to listen on; port 0 picks one")
	f.StringVar(&callers, "callers-token-file", "", "file with the bearer token that callers must show; required beyond loopback")
	f.StringVar(&job, "job", "", "with --server: follow the newest policy of this job")
	f.StringArrayVar(&targets, "target", nil, "NAME=URL of an enforcement point; may be repeated")
	f.StringVar(&targetKey, "target-key-env", "", "environment variable with the token that targets are shown")
	f.StringVar(&apply, "apply", "", "apply strategies to the target of this name; default: dry run")
	f.BoolVar(&r.AllowHarmful, "allow-harmful", false, "apply tools that stop a service with the attack, too")
	f.IntVar(&r.PerHour, "apply-per-hour", r.PerHour, "most decisions that are applied within an hour")
	f.DurationVar(&r.Timeout, "answer-timeout", r.Timeout, "longest time of one answer")
	f.StringVar(&r.Dir, "out", "", "directory that decisions are recorded in (decisions.jsonl)")
	f.Float64Var(&s.Temperature, "temperature", s.Temperature, "of sampling; 0 takes the likeliest token")
	f.IntVar(&s.Most, "summaries", s.Most, "most summaries in a prompt, as in training")
	f.IntVar(&s.MaxPrompt, "max-prompt", s.MaxPrompt, "tokens of a prompt that memory is planned with")
	f.IntVar(&s.MaxTokens, "max-tokens", s.MaxTokens, "longest strategy in tokens")
	l.bindPolicy(cmd, "")
	return cmd
}

// guarded refuses to listen beyond loopback without a token.
func guarded(listen, token string) error {
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return fault.BadField("listen", listen, "HOST:PORT")
	}
	ip := net.ParseIP(host)
	if token == "" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fault.BadField("callers-token-file", `""`, "a token, since "+listen+" is not on loopback")
	}
	return nil
}

// chooseTarget resolves --apply among --target.
func chooseTarget(r *loop.Responder, apply string, targets []string, keyEnv string) error {
	key, err := keyFrom("target-key-env", keyEnv)
	if err != nil {
		return err
	}
	for _, t := range targets {
		name, url, ok := strings.Cut(t, "=")
		if !ok || name == "" {
			return fault.BadField("target", t, "NAME=URL")
		}
		w, err := loop.NewWebTarget(name, url, key, 10*time.Second)
		if err != nil {
			return err
		}
		if name == apply {
			r.Target = w
		}
	}
	if apply != "" && r.Target == nil {
		return fault.BadField("apply", apply, "the name of a --target")
	}
	return nil
}

func serveResponder(ctx context.Context, con console, listen string, r *loop.Responder) error {
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	mode := "dry run"
	if r.Target != nil {
		mode = "applied to " + r.Target.Name()
	}
	fmt.Fprintf(con.out, "{\"msg\":\"listening\",\"addr\":%q,\"mode\":%q}\n", ln.Addr(), mode)
	srv := &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: r.Timeout + 30*time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.Background(), r.Timeout)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil {
		return err
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
