//! `retort query`.

use crate::cli::{Context, Error, Exit, FormatArgs, talk};
use crate::store::{Access, Store, StoreError};

/// Arguments of `query`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One SQL statement; without it, the views and their columns are printed.
    #[arg(long, value_name = "SQL")]
    pub sql: Option<String>,
    /// The same as --sql.
    #[arg(value_name = "SQL", conflicts_with = "sql")]
    pub statement: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Runs a read-only SQL query on the history.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let rows = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let answer = match args.sql.as_ref().or(args.statement.as_ref()) {
            Some(sql) => store.query(sql).await,
            None => store.query(VIEWS).await,
        };
        store.close().await;
        answer.map_err(|error| match error {
            // What SQLite finds wrong with the statement is the user's to mend.
            StoreError::Sql(error) => {
                let said = error
                    .as_database_error()
                    .map(|error| error.message().to_owned());
                let mut shown =
                    Error::new(Exit::Usage, "the statement cannot be answered").hint(HINT);
                shown.causes.push(said.unwrap_or_else(|| error.to_string()));
                shown
            }
            error => error.into(),
        })
    })?;
    Ok(talk::print(&rows.render(args.format.style(context)))?)
}

const HINT: &str = "`retort query` without a statement lists the views and their columns";

/// What may be asked: the views are kept, the tables under them may change.
const VIEWS: &str = "select v.name as view, group_concat(c.name, ', ') as columns
from sqlite_schema v join pragma_table_info(v.name) c
where v.type = 'view' and v.name glob 'v_*'
group by v.name order by v.name";
