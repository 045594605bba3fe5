package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
)

func newServe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the training server",
		Long:  "Run the training server. Settings come from defaults, --config, the environment (TRAINERD_*), then flags.\nThe address it listens on is printed to stdout as one JSON line.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := LoadConfig(cmd.Flags(), os.LookupEnv)
			if err != nil {
				return err
			}
			con := newConsole(cmd)
			manager, err := supervised(os.Getenv)
			if err != nil {
				return err
			}
			shown, err := json.Marshal(cfg.Redacted())
			if err != nil {
				return err
			}
			con.log.Info("configuration", "settings", json.RawMessage(shown))
			if names := strangers(os.Environ()); names != nil {
				con.log.Warn("the environment has what looks like settings and names none", "names", names)
			}
			p := &Program{Config: cfg, Log: con.log}
			if err := p.Start(cmd.Context()); err != nil {
				return err
			}
			con.log.Info("listening", "addr", p.addr.String(), "device", p.device.Info().Name, "version", engineVersion())
			fmt.Fprintf(con.out, "{\"msg\":\"listening\",\"addr\":%q}\n", p.addr)
			serveUntil(cmd.Context(), p, manager, con.log)
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(cfg.Shutdown))
			defer cancel()
			return p.Close(ctx)
		},
	}
	d := DefaultConfig()
	bindFlags(cmd.Flags(), membersOf(&d))
	cmd.Flags().String("config", "", "JSON file of settings, named as the flags with _ for -")
	return cmd
}

// serveUntil returns when the program shall stop: told to by ctx, or because it
// serves no more. From when it is told, /readyz answers 503, and for the time of
// the setting drain everything else goes on, so that load balancers can turn away.
func serveUntil(ctx context.Context, p *Program, boss supervisor, log *slog.Logger) {
	tell := func(state ...string) {
		if err := boss.tell(state...); err != nil {
			log.Warn("the service manager does not hear", "err", err)
		}
	}
	tell("READY=1", "STATUS=listening on "+p.addr.String())
	watched, end := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { boss.keepalive(watched, p.api) })
	defer watching.Wait()
	defer end()
	select {
	case <-ctx.Done():
	case err := <-p.served:
		p.served <- err
	}
	drain, within := time.Duration(p.Config.Drain), time.Duration(p.Config.Shutdown)
	log.Info("stopping", "drain", drain, "within", within)
	tell("STOPPING=1", "STATUS=finishing the running step", fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (drain+within+5*time.Second).Microseconds()))
	p.api.Drain()
	time.Sleep(drain)
}
