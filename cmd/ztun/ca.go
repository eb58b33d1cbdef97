package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"ztun/admin/ca"
)

func caCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "the local certificate authority for machines without istiod"}
	var trustDomain string
	init := &cobra.Command{
		Use: "init DIR", Short: "make a new CA in DIR; the daemons of all nodes share it by LOCAL_CA_DIR",
		Args: oneArg("DIR"), ValidArgsFunction: directories,
		RunE: func(_ *cobra.Command, args []string) error {
			if err := ca.InitDir(args[0], trustDomain); err != nil {
				return err
			}
			fmt.Println("made a local CA in", args[0])
			return nil
		},
	}
	init.Flags().StringVar(&trustDomain, "trust-domain", "cluster.local", "trust domain that the root certificate names")
	cmd.AddCommand(init)
	return cmd
}
