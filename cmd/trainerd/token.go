package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"trainerd/internal/fault"
	"trainerd/server/access"
)

func newToken() *cobra.Command {
	root := &cobra.Command{
		Use:   "token",
		Short: "Make, list and revoke the tokens that let clients in",
		Long: "Make, list and revoke the tokens that let clients in. A server whose data directory has a tokens.json, or that is\n" +
			"given --tokens FILE, asks every client for one. A running server sees a change with the next request.",
	}
	var data, file string
	root.PersistentFlags().StringVar(&data, "data", DefaultConfig().Data, "data directory of the server")
	root.PersistentFlags().StringVar(&file, "tokens", "", "token file; default: tokens.json in the data directory")
	path := func() string {
		if file != "" {
			return file
		}
		return tokenFileIn(data)
	}

	var role, job, note, expires string
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a token and print it, once: the file keeps only its hash",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			roles, err := access.ParseRoles(role)
			if err != nil {
				return err
			}
			g := access.Grant{Roles: roles, Job: job, Note: note}
			if g.Expires, err = parseExpiry(expires, time.Now()); err != nil {
				return err
			}
			t, text, err := access.CreateToken(path(), g)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "token %s with role %s in %s; a server that ran without tokens takes it from its next start\n", t.ID, role, path())
			fmt.Fprintln(cmd.OutOrStdout(), text)
			return nil
		},
	}
	create.Flags().StringVar(&role, "role", "", "submit, read or admin; several with commas")
	create.Flags().StringVar(&job, "job", "", "the only job that the token is good for")
	create.Flags().StringVar(&note, "note", "", "what it is for")
	create.Flags().StringVar(&expires, "expires", "", `when it ends: a time (RFC 3339), days ("30d") or a duration ("12h"); default: never`)
	create.MarkFlagRequired("role")

	var asJSON bool
	list := &cobra.Command{
		Use:   "list",
		Short: "List the tokens, without secrets",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			tokens, err := access.ListTokens(path())
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				for _, t := range tokens {
					if err := enc.Encode(t); err != nil {
						return err
					}
				}
				return nil
			}
			tw := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "ID\tROLES\tJOB\tCREATED\tENDS\tNOTE")
			for _, t := range tokens {
				var roles []string
				for _, r := range t.Roles {
					roles = append(roles, string(r))
				}
				ends := "never"
				if !t.Expires.IsZero() {
					ends = t.Expires.Format(time.RFC3339)
				}
				if !t.Revoked.IsZero() {
					ends = "revoked " + t.Revoked.Format(time.RFC3339)
				}
				job := t.Job
				if job == "" {
					job = "all"
				}
				fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", t.ID, strings.Join(roles, ","), job, t.Created.Format(time.RFC3339), ends, t.Note)
			}
			return tw.Flush()
		},
	}
	list.Flags().BoolVar(&asJSON, "as-json", false, "print JSON lines")

	revoke := &cobra.Command{
		Use:   "revoke ID",
		Short: "End a token",
		Args:  takes(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := access.RevokeToken(path(), args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "token %s ended at %s\n", t.ID, t.Revoked.Format(time.RFC3339))
			return nil
		},
	}
	root.AddCommand(create, list, revoke)
	return root
}

// parseExpiry reads a time, or a span from now on. "" is never.
func parseExpiry(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t, nil
	}
	var days int
	if n, err := fmt.Sscanf(text, "%dd", &days); err == nil && n == 1 && fmt.Sprintf("%dd", days) == text && days > 0 {
		return now.AddDate(0, 0, days), nil
	}
	if d, err := time.ParseDuration(text); err == nil && d > 0 {
		return now.Add(d), nil
	}
	return time.Time{}, fault.BadField("expires", text, `a time (RFC 3339), days ("30d") or a duration ("12h")`)
}
