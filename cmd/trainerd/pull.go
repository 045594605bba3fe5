package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"trainerd/client"
	"trainerd/internal/fault"
)

func newPull() *cobra.Command {
	var url, step string
	var wait time.Duration
	var to dial
	cmd := &cobra.Command{
		Use:   "pull JOB DIR",
		Short: "Fetch a job's checkpoint, verify it and swap it in as DIR",
		Long:  "Fetch the Hugging Face directory of a job's checkpoint over HTTP. Every digest is verified before DIR changes,\nand DIR is swapped in one step: an inference node never sees a part of a policy.",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			con := newConsole(cmd)
			o, err := to.options(os.Getenv)
			if err != nil {
				return err
			}
			c, err := client.New(url, o)
			if err != nil {
				return err
			}
			n := int64(0)
			if step != "latest" {
				if n, err = strconv.ParseInt(step, 10, 64); err != nil || n < 0 {
					return fault.BadField("step", step, "latest or a step number")
				}
			}
			if step == "latest" || wait > 0 {
				m, err := waitCheckpoint(cmd.Context(), c, args[0], n, wait)
				if err != nil {
					return err
				}
				if step == "latest" {
					n = m.Step
				}
			}
			m, err := c.Pull(cmd.Context(), args[0], n, args[1])
			if err != nil {
				return err
			}
			fmt.Fprintf(con.out, "%s: step %d of job %s, %d files, %d bytes, all digests match\n", args[1], m.Step, m.Job, len(m.Files), m.Bytes("hf/"))
			return nil
		},
	}
	cmd.Flags().StringVar(&url, "server", "http://127.0.0.1:8080", "address of the server")
	cmd.Flags().StringVar(&step, "step", "latest", "latest, or a step number")
	cmd.Flags().DurationVar(&wait, "wait", 0, "wait this long for the checkpoint")
	to.bind(cmd)
	return cmd
}
