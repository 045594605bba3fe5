package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
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
			shown, err := json.Marshal(cfg.Redacted())
			if err != nil {
				return err
			}
			con.log.Info("configuration", "settings", json.RawMessage(shown))
			p := &Program{Config: cfg, Log: con.log}
			if err := p.Start(cmd.Context()); err != nil {
				return err
			}
			fmt.Fprintf(con.out, "{\"msg\":\"listening\",\"addr\":%q}\n", p.addr)
			select {
			case <-cmd.Context().Done():
			case err := <-p.served:
				p.served <- err
			}
			con.log.Info("stopping", "within", time.Duration(cfg.Shutdown))
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
